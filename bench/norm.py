"""The norm family against its peers, in one run: `python -m r1.bench.norm [--repeats N]`.

- `RMSNorm`, at DeepSeek-V3's widths, and with its backward: ours, torch's own, written out in torch (on a GPU through
  torch.compile too), Liger's and TransformerEngine's where they run.
- `rotary`, of a part of wider heads as in MLA, pairs side by side, and with its backward: ours, and written out.

Rates count every tensor once: the inputs and gradients that must be read, the results that must be written. Each stands
beside a copy of as many bytes. The error is against float64. On a CPU the shapes are small and everything is float32.
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
from r1.kernels import apply_rope, rms_norm, rope_tables

EPS = 1e-6
NORMS = {  # (tokens, width)
    "cpu": [(2048, 512), (2048, 1536), (512, 7168)],
    "cuda": [(8192, 512), (8192, 1536), (8192, 7168), (8192, 5120), (131072, 512)],
}
ROTARY = {  # (tokens, heads, width of a head, of which the last are rotated)
    "cpu": [(512, 16, 192, 64), (8192, 1, 576, 64)],
    "cuda": [(8192, 128, 192, 64), (131072, 1, 576, 64)],
}

Function = Callable[..., Tensor]


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def of_liger(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


@functools.cache
def transformer_engine_norm(width: int) -> Any:
    from transformer_engine.pytorch import RMSNorm

    return RMSNorm(width, eps=EPS)


def of_transformer_engine(x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(transformer_engine_norm(len(weight)), {"weight": weight}, (x,))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    first, second, cos, sin = wide[..., 0::2], wide[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).to(x.dtype)


def contest(
    task: str, shape: tuple[int, ...], functions: dict[str, Function], leaves: list[Tensor], rest: tuple,
    plain: Function, device: str, repeats: int,
) -> list[_measure.Record]:  # fmt: skip
    """Forward, and forward with backward. `leaves` are those with a gradient, the first of them x."""
    x = leaves[0]
    up = torch.randn(x.shape, device=device).to(x.dtype)

    def both(function: Function, leaves: list[Tensor], rest: tuple, up: Tensor) -> tuple[Tensor, ...]:
        out = function(*leaves, *rest)
        return out.detach(), *torch.autograd.grad(out, leaves, up)

    double = [y.detach().double().requires_grad_() for y in leaves]
    exact = both(plain, double, tuple(y.double() for y in rest), up.double())
    label, size = " x ".join(map(str, shape)), x.numel() * x.element_size()
    forward, whole = {}, {}
    for name, function in functions.items():
        alone = torch.no_grad()(lambda f=function: (f(*leaves, *rest),))
        forward[name] = _measure.with_kernels(name, alone)
        whole[name] = _measure.with_kernels(name, lambda f=function: both(f, leaves, rest, up))
    # Forward: x, out. Backward: the gradient of out, and that of x; RMSNorm reads x again.
    passes = 5 if len(leaves) > 1 else 4
    base = {"shape": label, "dtype": str(x.dtype).removeprefix("torch.")}
    return [
        *_measure.beside_a_copy({"task": task, **base}, forward, exact[:1], 2 * size, device, repeats),
        *_measure.beside_a_copy(
            {"task": f"{task} with backward", **base}, whole, exact, passes * size, device, repeats
        ),
    ]


def with_ours(peers: dict[str, Function], ours: Function, plain: Function, device: str) -> dict[str, Function]:
    compiled = {"torch.compile": torch.compile(plain, dynamic=False)} if device == "cuda" else {}
    return {**peers, **compiled, **dict.fromkeys(_measure.ours("norm", device), ours)}


def measure_norm(shape: tuple[int, ...], device: str, repeats: int) -> list[_measure.Record]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in (shape, shape[1:]))
    peers: dict[str, Function] = {
        "written out": written_out,
        "torch's": lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, EPS),
    }
    if device == "cuda":
        peers |= {"Liger": of_liger, "TransformerEngine": of_transformer_engine}
    functions = with_ours(peers, lambda x, w: rms_norm(x, w, EPS), written_out, device)
    return contest("RMSNorm", shape, functions, [x, weight], (), written_out, device, repeats)


def measure_rotary(shape: tuple[int, ...], device: str, repeats: int) -> list[_measure.Record]:
    T, N, width, D = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randn(T, N, width, device=device).to(dtype)[..., width - D :].requires_grad_()
    tables = rope_tables(torch.arange(T, device=device), D, 10000.0)
    ours = lambda x, cos, sin: apply_rope(x, cos, sin, interleaved=True)
    functions = with_ours({"written out": rotated}, ours, rotated, device)
    return contest("rotary", shape, functions, [x], tables, rotated, device, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    records = []
    with Progress(transient=True) as progress:
        work = [(measure_norm, s) for s in NORMS[options.device]]
        work += [(measure_rotary, s) for s in ROTARY[options.device]]
        for measure, shape in progress.track(work, description="norm"):
            records += measure(shape, options.device, options.repeats)
    path = _measure.save("norm", options.device, records, options.out)
    _measure.show_beside_a_copy("norm", records)
    print(path)


if __name__ == "__main__":
    main()
