"""The fp8 family against its peers, in one run: `python -m r1.bench.fp8 [--repeats N]`.

- `quantise`: 1 x 128, 128 x 128, and both copies from one read; the rate counts the bytes read and written.
- `gemm`, `wgrad`: products of quantised operands at DeepSeek-V3's shapes: ours, torch in bf16 (cuBLAS),
  torch._scaled_mm and DeepGEMM where they run. The error is against float64 on the dequantised operands, a bf16
  product's against the operands that were quantised.
  A weight's gradient is float32 in ours and bf16 in torch's.
- `grouped`, `grouped wgrad`: the same for experts, against torch._grouped_mm in bf16.
- `path`: what training pays: both operands quantised and all three products of a linear layer, against bf16, and
  TransformerEngine's blockwise recipe where it runs.
- `expert path`: the same of experts, all six products and SwiGLU, their weights quantised in it, against
  torch._grouped_mm in bf16.

On a CPU the shapes are small and our backend is plain torch, which is a definition and no fast path.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from r1.bench import _measure
from r1.kernels import (
    dequantize,
    fp8_gemm,
    fp8_gemm_wgrad,
    fp8_grouped_gemm,
    fp8_grouped_gemm_wgrad,
    fp8_linear,
    fp8_moe_mlp,
    quantize_1x128,
    quantize_128x128,
    quantize_both,
)

# (tokens, outputs, inputs); the grouped ones have experts first
SHAPES = {
    "cpu": [(256, 512, 384)],
    "cuda": [
        (4096, 7168, 16384), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 7168, 2048), (4096, 2112, 7168),
        (4096, 32768, 512),
    ],
}  # fmt: skip
GROUPED = {
    "cpu": [(4, 256, 256, 384)],
    "cuda": [(4, 32768, 4096, 7168), (4, 32768, 7168, 2048), (8, 32763, 4096, 7168)],
}
# (experts, rows, expert width, hidden)
EXPERTS = {"cpu": [(4, 256, 128, 384)], "cuda": [(8, 32763, 2048, 7168)]}

Calls = dict[str, Callable[[], Any]]


def ours(call: Callable[[], Any], device: str) -> Calls:
    return {name: _measure.with_kernels(name, call) for name in _measure.ours("fp8", device)}


def scaled_mm(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    scale_b = b[1].t()
    return lambda: torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=scale_b, out_dtype=torch.bfloat16)


def deep_gemm(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    library = importlib.import_module("deep_gemm")
    out = a[0].new_empty((a[0].shape[0], b[0].shape[0]), dtype=torch.bfloat16)

    def call() -> Tensor:
        library.fp8_gemm_nt(a, b, out)
        return out

    return call


def transformer_engine(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A linear of its own under Float8BlockScaling, which quantises as DeepSeek-V3 does; it holds the weight itself."""
    library = importlib.import_module("transformer_engine.pytorch")
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
    linear = library.Linear(weight.shape[1], weight.shape[0], bias=False, params_dtype=weight.dtype, device=x.device)
    linear.weight = torch.nn.Parameter(weight.detach())

    def call(x: Tensor, up: Tensor) -> Tensor:
        with library.fp8_autocast(enabled=True, fp8_recipe=recipe):
            out = linear(x)
        torch.autograd.grad(out, [x, linear.weight], up)
        return out.detach()

    return call


def grouped_mm_experts(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    ends = counts.cumsum(0).int()
    gate, up = torch._grouped_mm(x, gate_up, offs=ends).chunk(2, -1)
    return torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=ends)


def measured(
    task: str, shape: tuple[int, ...], calls: Calls, failed: dict[str, str], exact: dict[str, Tensor], device: str,
    repeats: int, flops: float = 0, moved: Callable[[str], float] = lambda name: 0,
) -> list[_measure.Record]:  # fmt: skip
    """One record a contender: its time, rate, and error against its entry of `exact`, or against ours."""
    base = {"task": task, "shape": list(shape)}
    errors = {}
    for name in list(calls):
        try:
            out, want = calls[name](), exact.get(name, exact.get("ours"))
            errors[name] = None if want is None else _measure.relative_error(out, want)
        except Exception as error:  # a peer that fails must not cost the other results
            if name.startswith("r1 "):
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            del calls[name]
    records = [{**base, "name": name, "failed": why} for name, why in failed.items()]
    for name, took in _measure.side_by_side(calls, device, repeats).items():
        rates = {"tflops": flops / took / 1e12} if flops else {"gigabytes_per_second": moved(name) / took / 1e9}
        records.append({**base, "name": name, "seconds": took, "relative_error": errors[name], **rates})
    return records


def measure_dense(shape: tuple[int, ...], device: str, repeats: int) -> list[_measure.Record]:
    M, N, K = shape
    half = torch.bfloat16
    x, w, g = (torch.randn(*s, device=device, dtype=half) for s in ((M, K), (N, K), (M, N)))
    a, b = quantize_1x128(x), quantize_128x128(w)
    (_, _, *x_across), (_, _, *g_across) = quantize_both(x), quantize_both(g)
    records = []
    for name, quantise, source, copies in (
        ("quantise 1x128", quantize_1x128, x, 1),
        ("quantise 128x128", quantize_128x128, w, 1),
        ("quantise both", quantize_both, x, 2),
    ):
        copy = torch.empty_like(source)
        calls = {"copy in bf16": lambda s=source, c=copy: c.copy_(s)}
        calls |= ours(lambda q=quantise, s=source: q(s), device)
        moved = lambda name, s=source, c=copies: s.numel() * (2 + (c if name.startswith("r1 ") else 2))
        records += measured(name, tuple(source.shape), calls, {}, {}, device, repeats, moved=moved)
    flops = 2.0 * M * N * K
    wide = lambda pair, rows: dequantize(*pair, (rows, 128), torch.float32)
    double = lambda y, z: (y.double() @ z.double().t()).float()
    failed: dict[str, str] = {}
    calls = {"bf16": lambda: x @ w.t(), **ours(lambda: fp8_gemm(*a, *b), device)}
    if device == "cuda":
        for name, peer in (("torch._scaled_mm", scaled_mm), ("DeepGEMM", deep_gemm)):
            try:
                calls[name] = peer(a, b)
            except Exception as error:  # a library that is there may still fail to load
                failed[name] = f"{type(error).__name__}: {error}"[:300]
    exact = {"ours": double(wide(a, 1), wide(b, 128)), "bf16": double(x, w)}
    records += measured("gemm", shape, calls, failed, exact, device, repeats, flops)
    calls = {"bf16": lambda: g.t() @ x}
    calls |= ours(lambda: fp8_gemm_wgrad(*g_across, *x_across), device)
    exact = {"ours": double(wide(g_across, 1), wide(x_across, 1)), "bf16": double(g.t(), x.t())}
    records += measured("wgrad", shape, calls, {}, exact, device, repeats, flops)
    leaves = [x.requires_grad_(), w.requires_grad_()]

    def both(linear: Callable[..., Tensor]) -> Tensor:
        out = linear(*leaves)
        torch.autograd.grad(out, leaves, g)
        return out.detach()

    calls = {"bf16": lambda: both(torch.nn.functional.linear), **ours(lambda: both(fp8_linear), device)}
    failed = {}
    if device == "cuda":
        try:
            theirs = transformer_engine(x, w)
            calls["TransformerEngine"] = lambda: theirs(x, g)
        except Exception as error:
            failed["TransformerEngine"] = f"{type(error).__name__}: {error}"[:300]
    return records + measured("path", shape, calls, failed, {}, device, repeats, 3 * flops)


def measure_grouped(shape: tuple[int, ...], device: str, repeats: int) -> list[_measure.Record]:
    E, P, N, K = shape
    half = torch.bfloat16
    x, w, g = (torch.randn(*s, device=device, dtype=half) for s in ((P, K), (E, N, K), (P, N)))
    counts = torch.full((E,), P // E, device=device)
    counts[0], counts[1] = counts[0] + 37, counts[1] - 37  # no multiple of any tile
    ends = counts.cumsum(0).int()
    a, (_, _, *x_across), (_, _, *g_across) = quantize_1x128(x), quantize_both(x), quantize_both(g)
    b, b_s = (torch.stack(parts) for parts in zip(*(quantize_128x128(e) for e in w)))
    flops = 2.0 * P * N * K
    calls = {"bf16, torch._grouped_mm": lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends)}
    calls |= ours(lambda: fp8_grouped_gemm(*a, b, b_s, counts), device)
    wide = dequantize(*a)
    parts = zip(wide.split(counts.tolist()), b, b_s)
    exact = torch.cat([y @ dequantize(q, s, (128, 128)).t() for y, q, s in parts])
    plain = torch.cat([y @ v.t() for y, v in zip(x.float().split(counts.tolist()), w.float())])
    compared = {"ours": exact, "bf16, torch._grouped_mm": plain}
    records = measured("grouped", shape, calls, {}, compared, device, repeats, flops)
    calls = {"bf16, torch._grouped_mm": lambda: torch._grouped_mm(g.t(), x, offs=ends)}
    calls |= ours(lambda: fp8_grouped_gemm_wgrad(*g_across, *x_across, counts), device)
    parts = [dequantize(*y).split(counts.tolist(), 1) for y in (g_across, x_across)]
    exact = torch.stack([y @ z.t() for y, z in zip(*parts)])
    plain = torch.stack([y.t() @ z for y, z in zip(g.float().split(counts.tolist()), x.float().split(counts.tolist()))])
    compared = {"ours": exact, "bf16, torch._grouped_mm": plain}
    return records + measured("grouped wgrad", shape, calls, {}, compared, device, repeats, flops)


def measure_experts(shape: tuple[int, ...], device: str, repeats: int) -> list[_measure.Record]:
    E, P, F, H = shape
    half = torch.bfloat16
    x, gate_up, down = (
        (torch.randn(*size, device=device) * size[-2] ** -0.5).to(half).requires_grad_()
        for size in ((P, H), (E, H, 2 * F), (E, F, H))
    )
    counts = torch.full((E,), P // E, device=device)
    counts[0] += P - int(counts.sum())
    leaves, up = [x, gate_up, down], torch.randn(P, H, device=device, dtype=half)

    def both(experts: Callable[..., Tensor]) -> Tensor:
        out = experts(x, counts, gate_up, down)
        torch.autograd.grad(out, leaves, up)
        return out.detach()

    calls = {"bf16, torch._grouped_mm": lambda: both(grouped_mm_experts), **ours(lambda: both(fp8_moe_mlp), device)}
    return measured("expert path", shape, calls, {}, {}, device, repeats, 18.0 * P * F * H)


def table(records: list[_measure.Record]) -> None:
    rows = []
    for r in records:
        shape = " x ".join(map(str, r["shape"]))
        if "failed" in r:
            rows.append([f"{r['task']}: {r['name']}", shape, r["failed"], "", "", ""])
            continue
        peer = next(p for p in records if (p["task"], p["shape"]) == (r["task"], r["shape"]) and "failed" not in p)
        rate = f"{r['tflops']:.4g} TFLOP/s" if "tflops" in r else f"{r['gigabytes_per_second']:.4g} GB/s"
        error = r["relative_error"]
        rows.append([
            f"{r['task']}: {r['name']}", shape, f"{r['seconds'] * 1e3:.3f}", f"{peer['seconds'] / r['seconds']:.2f}",
            rate, "" if error is None else f"{error:.1e}",
        ])  # fmt: skip
    _measure.show("fp8", ["", "shape", "ms", "times as fast as the first", "rate", "error"], rows)


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
        work = [(measure_dense, s) for s in SHAPES[options.device]]
        work += [(measure_grouped, s) for s in GROUPED[options.device]]
        work += [(measure_experts, s) for s in EXPERTS[options.device]]
        for measure, shape in progress.track(work, description="fp8"):
            records += measure(shape, options.device, options.repeats)
    path = _measure.save("fp8", options.device, records, options.out)
    table(records)
    print(path)


if __name__ == "__main__":
    main()
