"""The optim family against its peers, in one run: `python -m r1.bench.optim [--parameters N] [--repeats N]`.

- `AdamW, float32`: weights, gradients and moments in float32, 28 bytes moved for each parameter: ours, torch's fused
  and its foreach, TransformerEngine's where it runs.
- `AdamW, masters`: bf16 weights with float32 masters, float32 gradients, bf16 moments: 22 bytes.
- `AdamW, bf16`: everything in bf16, rounded stochastically: 14 bytes.
- `gradient norm`: 4 bytes.

Each stands beside a copy of as many bytes, in the same turns. The error is that of 100 steps on small tensors against
torch.optim.AdamW in float64, as a part of how far that moved; of the norm, against float64.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from r1.bench import _measure
from r1.kernels import adamw_step, grad_norm

SIZES = {"cpu": (4_000_000, 50), "cuda": (1_000_000_000, 1000)}  # parameters, tensors
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# The types of weights, gradients, moments, and masters if there are any; bytes moved for each parameter.
KINDS: dict[str, tuple[Any, ...]] = {
    "AdamW, float32": (torch.float32, torch.float32, torch.float32, None, 28),
    "AdamW, masters": (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, 22),
    "AdamW, bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, None, 14),
}

Tensors = list[Tensor]
Step = Callable[[], Any]


def shapes(parameters: int, count: int) -> list[tuple[int, ...]]:
    """Matrices, and after every fourth a vector as of a norm."""
    vector, vectors = min(7168, parameters // count), count // 5
    matrix = (parameters - vectors * vector) // (count - vectors)
    width = 16 * max(1, int(matrix**0.5) // 16)
    rows = max(1, matrix // width)
    return [(vector,) if i % 5 == 4 else (rows, width) for i in range(count)]


def ours(name: str, task: str, weights: Tensors, grads: Tensors, masters: Tensors | None) -> Step:
    moments = [[torch.zeros_like(w, dtype=KINDS[task][2]) for w in weights] for _ in range(2)]
    step, settings = 0, {k: v for k, v in SETTINGS.items() if k != "betas"}

    def call() -> None:
        nonlocal step
        step += 1
        adamw_step(
            weights, grads, *moments, step, beta1=SETTINGS["betas"][0], beta2=SETTINGS["betas"][1], masters=masters,
            stochastic_rounding=masters is None and weights[0].dtype == torch.bfloat16, **settings,
        )  # fmt: skip

    return _measure.with_kernels(name, call)


def of_torch(weights: Tensors, grads: Tensors, masters: Tensors | None, **how: bool) -> Step:
    leaves = [w.detach().requires_grad_() for w in weights]
    for leaf, grad in zip(leaves, grads):
        leaf.grad = grad
    return torch.optim.AdamW(leaves, **SETTINGS, **how).step


def of_transformer_engine(weights: Tensors, grads: Tensors, masters: Tensors | None) -> Step:
    from transformer_engine.pytorch.optimizers import FusedAdam

    leaves = [torch.nn.Parameter(w) for w in weights]
    for leaf, grad in zip(leaves, grads):
        leaf.grad = grad
    return FusedAdam(leaves, **SETTINGS, adam_w_mode=True).step


def contenders(task: str, device: str) -> dict[str, Callable[..., Step]]:
    found = {name: functools.partial(ours, name, task) for name in _measure.ours("optim", device)}
    if task != "AdamW, float32":
        return found
    peers: dict[str, Callable[..., Step]] = {
        f"torch's, {how}": functools.partial(of_torch, **{how: True}) for how in ("fused", "foreach")
    }
    if device == "cuda":
        peers["TransformerEngine"] = of_transformer_engine
    return peers | found


def numbers(task: str, sizes: list[tuple[int, ...]], device: str) -> tuple[Tensors, Tensors, Tensors | None]:
    weight, grad, _, master, _ = KINDS[task]
    weights = [torch.randn(s, device=device).to(weight) for s in sizes]
    grads = [torch.randn(s, device=device).to(grad) for s in sizes]
    return weights, grads, [w.to(master) for w in weights] if master else None


def error_of(build: Callable[..., Step], task: str, device: str) -> float:
    weights, grads, masters = numbers(task, [(64, 64), (300,)], device)
    start = torch.cat([w.double().flatten() for w in weights])
    double = [w.double() for w in weights]
    exact = of_torch(double, [g.double() for g in grads], None)
    step = build(weights, grads, masters)
    for _ in range(100):
        exact()
        step()
    want, got = (torch.cat([w.double().flatten() for w in x]) for x in (double, masters or weights))
    return float((got - want).norm() / (want - start).norm())


def measure_adamw(task: str, size: tuple[int, int], device: str, repeats: int) -> list[_measure.Record]:
    state = numbers(task, shapes(*size), device)
    count = sum(w.numel() for w in state[0])
    base = {"task": task, "shape": f"{count} in {len(state[0])} tensors"}
    errors, calls, failed = {}, {}, []
    for name, build in contenders(task, device).items():
        try:
            errors[name] = error_of(build, task, device)
            step = build(*state)
            calls[name] = lambda step=step: (step(), ())[1]
        except Exception as error:  # a peer that fails must not cost the other results
            if name.startswith("r1 "):
                raise
            failed.append({**base, "name": name, "failed": f"{type(error).__name__}: {error}"[:300]})
    records = _measure.beside_a_copy(base, calls, (), KINDS[task][-1] * count, device, repeats)
    return failed + [{**r, "relative_error": errors.get(r["name"])} for r in records]


def measure_norm(size: tuple[int, int], device: str, repeats: int) -> list[_measure.Record]:
    grads = [torch.randn(s, device=device) for s in shapes(*size)]
    count = sum(g.numel() for g in grads)
    exact = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    calls: dict[str, Step] = {"torch's, foreach": lambda: (torch.nn.utils.get_total_norm(grads, foreach=True),)}
    for name in _measure.ours("optim", device):
        calls[name] = _measure.with_kernels(name, lambda: (grad_norm(grads),))
    base = {"task": "gradient norm", "shape": f"{count} in {len(grads)} tensors"}
    return _measure.beside_a_copy(base, calls, (exact,), 4 * count, device, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    parameters, count = SIZES[options.device]
    size = options.parameters or parameters, count
    records = []
    with Progress(transient=True) as progress:
        for task in progress.track(KINDS, description="optim"):
            records += measure_adamw(task, size, options.device, options.repeats)
    records += measure_norm(size, options.device, options.repeats)
    path = _measure.save("optim", options.device, records, options.out)
    _measure.show_beside_a_copy("optim", records)
    print(path)


if __name__ == "__main__":
    main()
