"""The moe family against its peers, in one run: `python -m r1.bench.moe [--tokens T] [--repeats N]`.

- `layer`: a whole mixture-of-experts layer, router to output, forward with backward: ours, and Megatron-core's own with
  its SequentialMLP. Both hold the same weights, and their outputs are compared.
- `experts`: given who goes where, forward with backward, under balanced, Zipf and one-hot load: ours, and a loop over
  the experts in torch (with torch._grouped_mm where it runs). The error is against float64.
- `route`, `permute`: the router, and permute with unpermute, against plain torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from r1.bench import _measure
from r1.kernels import moe_layer, permute, route, unpermute
from r1.parallel.config import ModelConfig, ParallelConfig

LOADS = ("balanced", "zipf", "one-hot")
# (hidden, expert width, experts, chosen, groups, groups chosen)
SHAPES = {
    "cpu": {"tiny preset": (128, 64, 8, 2, 4, 2), "64 experts": (256, 128, 64, 8, 8, 4)},
    "cuda": {
        "DeepSeek-V3, 32 experts a rank": (7168, 2048, 32, 8, 1, 1),
        "SonicMoE's 7B": (4096, 1024, 128, 8, 1, 1),
        "Qwen3 30B-A3B": (2048, 768, 128, 8, 1, 1),
    },
}
TOKENS = {"cpu": 4096, "cuda": 32768}


def choose_ids(load: str, T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    """K different experts a token. one-hot: the first K take everything."""
    if load == "one-hot":
        return torch.arange(K, device=generator.device).expand(T, K).contiguous()
    odds = torch.ones(E, device=generator.device)
    if load == "zipf":
        odds = 1 / torch.arange(1, E + 1, device=generator.device)
    return torch.multinomial(odds.expand(T, E), K, generator=generator)


def loop(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, k = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e]).chunk(2, -1)
        middle = torch.nn.functional.silu(gate) * up * weights[token, k, None].to(x.dtype)
        out = out.index_add(0, token, middle @ down[e])
    return out


def grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """torch's own grouped product, between an argsort and an index_add."""
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=len(gate_up)).cumsum(0).int()
    token = order // ids.shape[1]
    gate, up = torch._grouped_mm(x[token], gate_up, offs=ends).chunk(2, -1)
    middle = torch.nn.functional.silu(gate) * up * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, torch._grouped_mm(middle, down, offs=ends))


def _record(task: str, name: str, shape: str, load: str, **values: Any) -> _measure.Record:
    return {"task": task, "name": name, "shape": shape, "load": load, **values}


def _both(function: Callable[..., Tensor], leaves: list[Tensor], rest: Callable[..., tuple], up: Tensor) -> Any:
    out = function(*rest(*leaves))
    return (out.detach(), *torch.autograd.grad(out, leaves, up))


def measure_experts(label: str, shape: tuple[int, ...], T: int, device: str, repeats: int) -> list[_measure.Record]:
    H, F, E, K = shape[:4]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=generator, device=device)
    x, gate_up, down = normal(T, H).to(dtype), (normal(E, H, 2 * F) / H**0.5).to(dtype), (normal(E, F, H) / F**0.5)
    leaves = [y.requires_grad_() for y in (x, normal(T, K).sigmoid(), gate_up, down.to(dtype))]
    up = normal(T, H).to(dtype)
    records = []
    for load in LOADS:
        ids = choose_ids(load, T, E, K, generator)
        arguments = lambda x, w, a, b, ids=ids: (x, ids, w, a, b)
        exact = None
        if T * K * H * F <= 2**36 or device == "cuda":
            doubled = [y.detach().double().requires_grad_() for y in leaves]
            exact = [y.float() for y in _both(loop, doubled, arguments, up.double())]
            del doubled
        contenders: dict[str, Callable[..., Tensor]] = {"loop over experts": loop}
        if device == "cuda":
            contenders["torch._grouped_mm"] = grouped_mm
        contenders |= dict.fromkeys(_measure.ours("moe", device), moe_layer)
        both, forward = {}, {}
        for name, function in contenders.items():
            call = lambda f=function, a=arguments: _both(f, leaves, a, up)
            both[name] = _measure.with_kernels(name, call)
            forward[name] = _measure.with_kernels(name, torch.no_grad()(lambda f=function, a=arguments: f(*a(*leaves))))
        errors, extra = {}, {}
        for name in list(both):
            try:
                errors[name] = [_measure.relative_error(a, b) for a, b in zip(both[name](), exact or [])]
                extra[name] = _measure.peak_bytes(both[name], device) if device == "cuda" else None
            except Exception as error:  # a peer that fails must not cost the other results
                if name.startswith("r1 "):
                    raise
                records.append(_record("experts", name, label, load, failed=f"{type(error).__name__}: {error}"[:300]))
                del both[name], forward[name]
        all_times = _measure.side_by_side(both, device, repeats)
        forward_times = _measure.side_by_side(forward, device, repeats)
        flops = 6e-12 * T * K * H * F
        for name, took in all_times.items():
            records.append(_record(
                "experts", name, label, load, tokens=T, seconds_forward=forward_times[name],
                seconds_forward_backward=took, tflops_forward=flops / forward_times[name],
                tflops_forward_backward=3 * flops / took, extra_bytes=extra[name],
                relative_errors=dict(zip(("out", "dx", "dweights", "dgate_up", "ddown"), errors[name])),
            ))  # fmt: skip
    return records


def measure_routing(label: str, shape: tuple[int, ...], T: int, device: str, repeats: int) -> list[_measure.Record]:
    H, _, E, K, groups, group_top = shape
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(T, E, generator=generator, device=device).requires_grad_()
    bias, up = torch.zeros(E, device=device), torch.randn(T, K, generator=generator, device=device)
    x = torch.randn(T, H, generator=generator, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)

    def plain_route() -> None:
        score = logits.sigmoid()
        choice = (score + bias).detach()
        if groups > 1:
            best = choice.view(T, groups, -1).topk(2, -1).values.sum(-1).topk(group_top, -1).indices
            keep = torch.zeros(T, groups, device=device).scatter(1, best, 1.0)
            choice = choice.masked_fill(keep.repeat_interleave(E // groups, 1) == 0, -torch.inf)
        chosen = score.gather(1, choice.topk(K, -1).indices)
        torch.autograd.grad(chosen / chosen.sum(-1, keepdim=True), logits, up)

    def our_route() -> None:
        torch.autograd.grad(route(logits, bias, K, groups, group_top, 1.0)[1], logits, up)

    ids = choose_ids("balanced", T, E, K, generator)

    def plain_permute() -> None:
        order = ids.flatten().argsort(stable=True)
        torch.zeros_like(x).index_add_(0, order // K, x[order // K])

    def our_permute() -> None:
        rows, row_map, _ = permute(x, ids, E)
        unpermute(rows, row_map, T, K)

    records = []
    for task, plain, ours in (("route", plain_route, our_route), ("permute", plain_permute, our_permute)):
        names = {"plain torch": plain} | dict.fromkeys(_measure.ours("moe", device), ours)
        calls = {name: _measure.with_kernels(name, call) for name, call in names.items()}
        for name, took in _measure.side_by_side(calls, device, repeats * 3).items():
            # permute and back: x read, P rows written, read again, one result written
            moved = 2 * x.element_size() * H * T * (1 + K) if task == "permute" else None
            records.append(_record(
                task, name, label, "balanced", tokens=T, seconds_forward_backward=took,
                gigabytes_per_second=moved and moved / took / 1e9,
            ))  # fmt: skip
    return records


def measure_layer(label: str, shape: tuple[int, ...], T: int, device: str, repeats: int) -> list[_measure.Record]:
    """Our layer and Megatron's, as a model has them: router, shared expert, dispatch, experts."""
    if importlib.util.find_spec("megatron") is None:
        return [
            _record("layer", "Megatron MoELayer, SequentialMLP", label, "", failed="megatron-core is not installed")
        ]
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    from r1.parallel.model import decoder_config, layer_spec
    from r1.parallel.world import join

    class TheirRouter(TopKRouter):
        def gating(self, input: Tensor) -> Tensor:  # without TransformerEngine their own names what it has not imported
            return torch.nn.functional.linear(input.float(), self.weight.float())

    H, F, E, K, groups, group_top = shape
    if K // group_top != 2:  # then Megatron scores a group by other than its two best, and chooses other experts
        groups, group_top = 1, 1
    parallel = ParallelConfig(dtype="float32" if device == "cpu" else "bfloat16")
    model = ModelConfig(
        hidden_size=H, num_layers=1, num_dense_layers=0, num_experts=E, experts_per_token=K, expert_hidden_size=F,
        num_expert_groups=groups, groups_per_token=group_top, num_shared_experts=1, num_heads=4, vocab_size=256,
        max_positions=T, ffn_hidden_size=F, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=32, num_mtp_layers=0,
    )  # fmt: skip
    world = join(parallel)
    config = decoder_config(model, parallel)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    spec = layer_spec(config, moe=True).submodules.mlp
    ours = spec.module(config, submodules=spec.submodules, layer_number=1, pg_collection=world.groups)
    theirs = MoELayer(
        config,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=linears),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
            router=TheirRouter,
        ),
        layer_number=1,
        pg_collection=world.groups,
    )
    generator = torch.Generator().manual_seed(0)
    draw = lambda p: p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    for parameter in ours.parameters():
        draw(parameter)
    theirs.router.weight.data.copy_(ours.router.weight)
    for a, b in zip(theirs.shared_experts.parameters(), ours.shared_experts.parameters(), strict=True):
        a.data.copy_(b)
    for e, expert in enumerate(theirs.experts.local_experts):
        expert.linear_fc1.weight.data.copy_(ours.experts.gate_up[e].flatten(1).t())
        expert.linear_fc2.weight.data.copy_(ours.experts.down[e].t())
    x = torch.randn(T, 1, H, generator=generator).to(device, next(ours.parameters()).dtype).requires_grad_()
    up = torch.randn(T, 1, H, generator=generator).to(x.device, x.dtype)
    calls = {}
    for name, layer in {
        "Megatron MoELayer, SequentialMLP": theirs,
        **dict.fromkeys(_measure.ours("moe", device), ours),
    }.items():
        layer.to(device)

        def call(layer: Any = layer) -> Tensor:
            out = layer(x)[0]
            torch.autograd.grad(out, [x, *layer.parameters()], up)
            return out.detach()

        calls[name] = _measure.with_kernels(name, call)
    outputs = {name: call() for name, call in calls.items()}
    want = next(iter(outputs.values()))
    return [
        _record(
            "layer", name, label, "by the router", tokens=T, seconds_forward_backward=took,
            tflops_forward_backward=18e-12 * T * (K + 1) * H * F / took,
            relative_errors={"to Megatron's": _measure.relative_error(outputs[name], want)},
        )
        for name, took in _measure.side_by_side(calls, device, repeats).items()
    ]  # fmt: skip


def table(records: list[_measure.Record]) -> None:
    rows = []
    for r in records:
        if "failed" in r:
            rows.append([f"{r['task']}: {r['name']}", r["shape"], r["load"], r["failed"], "", "", "", ""])
            continue
        peer = next(x for x in records if all(x.get(k) == r.get(k) for k in ("task", "shape", "load", "tokens")))
        took = r["seconds_forward_backward"]
        rate = r.get("tflops_forward_backward")
        errors = r.get("relative_errors") or {}
        rows.append([
            f"{r['task']}: {r['name']}", r["shape"], f"{r['load']}, T {r['tokens']}",
            f"{r['seconds_forward'] * 1e3:.2f}" if r.get("seconds_forward") else "", f"{took * 1e3:.2f}",
            f"{peer['seconds_forward_backward'] / took:.2f}" if "failed" not in peer else "",
            f"{rate:.3g}" if rate else f"{r['gigabytes_per_second']:.0f} GB/s" if r.get("gigabytes_per_second") else "",
            f"{max(errors.values()):.1e}" if errors else "",
        ])  # fmt: skip
    columns = ["", "shape", "load", "forward ms", "all ms", "times as fast", "TFLOP/s", "error"]
    _measure.show("all: forward with backward, or there and back", columns, rows)


def plot(records: list[_measure.Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(r["task"] for r in records))
    figure, axes = pyplot.subplots(len(tasks), 1, figsize=(9, 3 * len(tasks)), squeeze=False)
    for axis, task in zip(axes[:, 0], tasks):
        rows = [r for r in records if r["task"] == task and "failed" not in r]
        labels = [f"{r['shape']}, {r['load']}: {r['name']}" for r in rows]
        colors = ["tab:blue" if r["name"].startswith("r1 ") else "tab:gray" for r in rows]
        axis.barh(labels, [r["seconds_forward_backward"] * 1e3 for r in rows], color=colors)
        axis.set_xlabel(f"{task}, ms")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    options = parser.parse_args()
    T = options.tokens or TOKENS[options.device]
    if options.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    records = []
    with Progress(transient=True) as progress:
        shapes = SHAPES[options.device]
        bar = progress.add_task("", total=3 * len(shapes))
        for label, shape in shapes.items():
            for measure in (measure_layer, measure_experts, measure_routing):
                progress.update(bar, description=f"{label}: {measure.__name__.removeprefix('measure_')}")
                # A layer's time has parts that do not grow with the tokens: small batches too.
                for tokens in (T // 16, T // 4, T) if measure is measure_layer else (T,):
                    records += measure(label, shape, tokens, options.device, options.repeats)
                progress.advance(bar)
    path = _measure.save("moe", options.device, records, options.out)
    plot(records, path.with_suffix(".png"))
    table(records)
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
