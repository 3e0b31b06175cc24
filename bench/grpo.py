"""The grpo family against its peers, in one run: `python -m r1.bench.grpo [--shape T,H,V ...] [--repeats N]`.

Three tasks, each from hidden states and the head's weight: per-token log-probabilities, mean cross-entropy, and the
GRPO loss; forward, and forward with backward. Peers: eager torch, torch.compile, Liger (its fused linear GRPO and
cross-entropy), cut-cross-entropy. The error is against float64. `extra` memory is what a forward with backward takes
beyond its inputs and the gradients. Rates count the products that the task needs (2 T H V forward, 6 T H V with
backward), not those that an implementation repeats. On a CPU every measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from r1.bench import _measure
from r1.kernels import grpo_loss, linear_cross_entropy, linear_grpo_loss, linear_logprob

SHAPES = {
    "cpu": [(4096, 512, 65536)],
    "cuda": [(8192, 7168, 129280), (8192, 4096, 128256), (8192, 3584, 152064)],  # DeepSeek-V3, Llama 3 8B, Qwen 2.5 7B
}
GROUP_LENGTH = 512  # tokens of one completion, for Liger, whose GRPO takes (sequences, length)
CLIP, KL = 0.2, 0.04


@dataclass
class Problem:
    """hidden_TH, weight_VH, targets, an upstream gradient, and what GRPO needs, all on one device."""

    shape: tuple[int, int, int]
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        T, H, V = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        normal = lambda *size: torch.randn(*size, generator=generator, device=self.device)
        self.hidden_TH = normal(T, H).to(self.dtype).requires_grad_()
        self.weight_VH = (normal(V, H) * (4 / H**0.5)).to(self.dtype).requires_grad_()
        self.targets_T = torch.randint(0, V, (T,), generator=generator, device=self.device)
        self.upstream_T = normal(T)
        self.sequences = max(1, T // GROUP_LENGTH)
        self.advantages_S = normal(self.sequences)
        with torch.no_grad():
            exact_T = linear_logprob(self.hidden_TH, self.weight_VH, self.targets_T)
        self.old_T, self.reference_T = exact_T + 0.1 * normal(T), exact_T + 0.1 * normal(T)
        self.advantages_T = self.advantages_S.repeat_interleave(-(-T // self.sequences))[:T]
        self.weights_T = torch.full_like(self.advantages_T, 1 / T)


def _eager_logprob(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return (h @ w.t()).float().log_softmax(-1).gather(1, t[:, None]).squeeze(1)


def _grpo_of(logprobs_T: Tensor, p: Problem) -> Tensor:
    """Plain torch, so that torch.compile sees all of it."""
    ratio = (logprobs_T - p.old_T).exp()
    surrogate = torch.minimum(ratio * p.advantages_T, ratio.clamp(1 - CLIP, 1 + CLIP) * p.advantages_T)
    d = p.reference_T - logprobs_T
    return (p.weights_T * (KL * (d.exp() - d - 1) - surrogate)).sum()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _liger_grpo(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=KL, loss_type="dapo", epsilon_low=CLIP, epsilon_high=CLIP, use_ref_model=True)
    S = p.sequences
    fold = lambda x: x.view(S, -1)
    return loss(
        p.hidden_TH.view(S, -1, p.hidden_TH.shape[1]), p.weight_VH, fold(p.targets_T),
        torch.ones_like(fold(p.targets_T)), p.advantages_S,
        ref_per_token_logps=fold(p.reference_T), old_per_token_logps=fold(p.old_T),
    )[0]  # fmt: skip


def _liger_cross_entropy(p: Problem) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    result = liger_fused_linear_cross_entropy(p.hidden_TH, p.weight_VH, p.targets_T)
    return result[0] if isinstance(result, tuple) else result


def _cut(p: Problem, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    # filter_eps=None: the exact gradient, as all others have it.
    return cut_cross_entropy(p.hidden_TH, p.weight_VH, p.targets_T, reduction=reduction, filter_eps=None)


def _args(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return p.hidden_TH, p.weight_VH, p.targets_T


def _r1_grpo(p: Problem, **options: Any) -> Tensor:
    return linear_grpo_loss(
        *_args(p), p.old_T, p.reference_T, p.advantages_T, p.weights_T, clip_low=CLIP, clip_high=CLIP,
        kl_coefficient=KL, **options,
    )[0]  # fmt: skip


def contenders(device: str, p_tokens: int) -> dict[str, dict[str, Callable[[Problem], Tensor]]]:
    """task → name → function. "r1 …" names what R1_KERNELS is set to; "kept" means with room for all logits."""
    liger, cut = (importlib.util.find_spec(name) for name in ("liger_kernel", "cut_cross_entropy"))
    eager_grpo = lambda p: _grpo_of(_eager_logprob(*_args(p)), p)
    tasks: dict[str, dict[str, Callable[[Problem], Tensor]]] = {
        "logprob": {
            "eager": lambda p: _eager_logprob(*_args(p)),
            "torch.compile": lambda p: _compiled(_eager_logprob)(*_args(p)),
        },
        "cross_entropy": {
            "eager": lambda p: -_eager_logprob(*_args(p)).mean(),
            "torch.compile": lambda p: _compiled(_eager_mean)(*_args(p)),
        },
        "grpo": {"eager": eager_grpo, "torch.compile": lambda p: _compiled(_eager_grpo_parts)(*_args(p), p)},
    }
    if cut and device == "cuda":  # its CPU path is torch.compile of the eager code
        tasks["logprob"]["cut-cross-entropy"] = lambda p: -_cut(p, "none")
        tasks["cross_entropy"]["cut-cross-entropy"] = lambda p: _cut(p, "mean")
    if liger:
        tasks["grpo"]["Liger"] = _liger_grpo
        if device == "cuda":
            tasks["cross_entropy"]["Liger"] = _liger_cross_entropy
    for name in _measure.ours("grpo", device):
        tasks["logprob"][name] = lambda p: linear_logprob(*_args(p))
        tasks["logprob"][f"{name} with entropy"] = lambda p: linear_logprob(*_args(p), return_entropy=True)[0]
        tasks["cross_entropy"][name] = lambda p: linear_cross_entropy(*_args(p)).mean()
        tasks["grpo"][name] = _r1_grpo
        tasks["grpo"][f"{name} kept"] = lambda p: _r1_grpo(p, chunk_tokens=p_tokens)
    return tasks


def _eager_mean(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return -_eager_logprob(h, w, t).mean()


def _eager_grpo_parts(h: Tensor, w: Tensor, t: Tensor, p: Problem) -> Tensor:
    return _grpo_of(_eager_logprob(h, w, t), p)


def exact(task: str, p: Problem) -> dict[str, Tensor]:
    """Output and gradients in float64, a block of tokens at a time; the gradients are kept in float32."""
    weight = p.weight_VH.detach().double()
    grad_weight = torch.zeros_like(weight)
    outputs, grad_hidden = [], []
    for rows in torch.arange(p.shape[0], device=p.device).split(256):
        hidden = p.hidden_TH.detach()[rows].double()
        logp = (hidden @ weight.t()).log_softmax(-1)
        chosen = logp.gather(1, p.targets_T[rows, None]).squeeze(1).requires_grad_()
        if task == "logprob":
            output, upstream = chosen, p.upstream_T[rows].double()
        elif task == "cross_entropy":
            output, upstream = -chosen / p.shape[0], torch.full_like(chosen, -1 / p.shape[0])
        else:
            output, _ = grpo_loss(
                chosen, *(x[rows].double() for x in (p.old_T, p.reference_T, p.advantages_T, p.weights_T)),
                clip_low=CLIP, clip_high=CLIP, kl_coefficient=KL,
            )  # fmt: skip
            (upstream,) = torch.autograd.grad(output, chosen)
        grad = logp.exp_().mul_(-upstream[:, None]).scatter_add_(1, p.targets_T[rows, None], upstream[:, None])
        grad_hidden.append((grad @ weight).float())
        grad_weight += grad.t() @ hidden
        outputs.append(output.detach().reshape(-1))
    output = torch.cat(outputs)
    return {
        "output": output if task == "logprob" else output.sum(),
        "dhidden": torch.cat(grad_hidden),
        "dweight": grad_weight.float(),
    }


def run(task: str, name: str, p: Problem, want: dict[str, Tensor], repeats: int) -> _measure.Record:
    function = contenders(p.device, p.shape[0])[task][name]
    forward = _measure.with_kernels(name, torch.no_grad()(lambda: function(p)))

    @functools.partial(_measure.with_kernels, name)
    def both() -> tuple[Tensor, ...]:
        output = function(p)
        upstream = p.upstream_T.to(output.dtype) if output.dim() else None
        return output.detach(), *torch.autograd.grad(output, (p.hidden_TH, p.weight_VH), upstream)

    both()  # whatever is compiled or imported on the first call must not count as memory
    peak = _measure.peak_bytes(both, p.device)
    got = dict(zip(("output", "dhidden", "dweight"), both()))
    errors = {key: _measure.relative_error(value, want[key]) for key, value in got.items()}
    gradients = sum(x.numel() * x.element_size() for x in (p.hidden_TH, p.weight_VH))
    del got
    seconds_forward = None if name.startswith("Liger") else _measure.seconds(forward, p.device, repeats)
    seconds_both = _measure.seconds(both, p.device, repeats)
    T, H, V = p.shape
    return {
        "task": task,
        "name": name,
        "shape": {"T": T, "H": H, "V": V},
        "dtype": str(p.dtype).removeprefix("torch."),
        "seconds_forward": seconds_forward,  # Liger makes its gradients in the forward
        "seconds_forward_backward": seconds_both,
        "tflops_forward": 2e-12 * T * H * V / seconds_forward if seconds_forward else None,
        "tflops_forward_backward": 6e-12 * T * H * V / seconds_both,
        "extra_bytes": max(0, peak - gradients),
        "relative_errors": errors,
    }


def _run_alone(task: str, name: str, shape: tuple[int, int, int], exact_file: str, repeats: int) -> _measure.Record:
    torch.set_num_threads(os.cpu_count() or 1)
    p = Problem(shape, "cpu", torch.float32)
    return run(task, name, p, torch.load(exact_file), repeats)


def measure(shape: tuple[int, int, int], device: str, repeats: int) -> list[_measure.Record]:
    p = Problem(shape, device, torch.float32 if device == "cpu" else torch.bfloat16)
    tasks = contenders(device, shape[0])
    records = []
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        bar = progress.add_task("", total=sum(map(len, tasks.values())))
        for task, names in tasks.items():
            want = exact(task, p)
            file = str(Path(folder) / "exact.pt")
            if device == "cpu":
                torch.save(want, file)
                del want
            for name in names:
                progress.update(bar, description=f"T, H, V = {shape}: {task}, {name}")
                try:
                    if device == "cpu":
                        spawn = multiprocessing.get_context("spawn")
                        with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                            record = alone.submit(_run_alone, task, name, shape, file, repeats).result()
                    else:
                        record = run(task, name, p, want, repeats)
                except Exception as error:  # a peer that fails must not cost the other results
                    if name.startswith("r1 "):
                        raise
                    record = {"task": task, "name": name, "failed": f"{type(error).__name__}: {error}"[:300]}
                records.append(record)
                progress.advance(bar)
    return records


def table(records: list[_measure.Record]) -> None:
    shapes = {tuple(r["shape"].values()) for r in records if "shape" in r}
    for shape in sorted(shapes):
        rows = []
        for r in records:
            if tuple(r.get("shape", {}).values()) != shape:
                continue
            eager = next(
                x for x in records if x["name"] == "eager" and x["task"] == r["task"] and x.get("shape") == r["shape"]
            )
            rows.append([
                f"{r['task']}: {r['name']}",
                f"{r['seconds_forward'] * 1e3:.1f}" if r["seconds_forward"] else "",
                f"{r['seconds_forward_backward'] * 1e3:.1f}",
                f"{r['seconds_forward_backward'] / eager['seconds_forward_backward']:.2f}",
                f"{r['tflops_forward_backward']:.3g}",
                f"{r['extra_bytes'] / 2**20:.0f}",
                *(f"{r['relative_errors'][k]:.1e}" for k in ("output", "dhidden", "dweight")),
            ])  # fmt: skip
        _measure.show(
            f"T, H, V = {shape}",
            ["", "forward ms", "+ backward ms", "/ eager", "TFLOP/s", "extra MiB", "error", "dhidden", "dweight"],
            rows,
        )
    for r in records:
        if "failed" in r:
            print(f"{r['task']}: {r['name']} failed: {r['failed']}")


def plot(records: list[_measure.Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [r for r in records if "failed" not in r]
    shapes = sorted({tuple(r["shape"].values()) for r in done})
    figure, axes = pyplot.subplots(2, len(shapes), figsize=(7 * len(shapes), 8), squeeze=False, sharey="row")
    for column, shape in enumerate(shapes):
        rows = [r for r in done if tuple(r["shape"].values()) == shape]
        labels = [f"{r['task']}: {r['name']}" for r in rows]
        colors = ["tab:blue" if r["name"].startswith("r1 ") else "tab:gray" for r in rows]
        for row, (key, scale, unit) in enumerate(
            (("seconds_forward_backward", 1e3, "forward + backward, ms"), ("extra_bytes", 2**-20, "extra memory, MiB"))
        ):
            axes[row][column].barh(labels, [r[key] * scale for r in rows], color=colors)
            axes[row][column].set_xlabel(unit)
            axes[row][column].invert_yaxis()
        axes[0][column].set_title(f"T, H, V = {shape}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = lambda text: tuple(int(x) for x in text.split(","))
    parser.add_argument("--shape", type=shape, action="append", metavar="T,H,V")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, help="of which the median counts; 3 on a CPU, 10 on a GPU")
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.device == "cpu" else 10)
    records = [r for s in options.shape or SHAPES[options.device] for r in measure(s, options.device, repeats)]
    path = _measure.save("grpo", options.device, records, options.out)
    plot(records, path.with_suffix(".png"))
    table(records)
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
