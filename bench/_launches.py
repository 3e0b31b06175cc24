"""Every Triton kernel as it is launched at DeepSeek-V3's sizes (hidden 7168, experts 2048 wide, vocabulary 129,280),
for _ahead_of_time.py. Where tensors would be gigabytes they are never touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1.kernels import numerics
from r1.kernels.fp8 import triton as fp8_kernels
from r1.kernels.grpo import triton as grpo_kernels
from r1.kernels.mla import fp8_latent_bytes
from r1.kernels.mla import triton as mla_kernels
from r1.kernels.moe import triton as moe_kernels
from r1.kernels.norm import triton as norm_kernels
from r1.kernels.optim import triton as optim_kernels

HALF, E4M3 = torch.bfloat16, torch.float8_e4m3fn
T, H, F, V = 8192, 7168, 2048, 129280
LOCAL_EXPERTS = 8


class Launch(NamedTuple):
    """`flops` of its products; an operator that `updates` its first argument reads and writes it."""

    function: Callable[..., Any]
    shape: str
    arguments: tuple
    flops: float = 0.0
    updates: bool = False

    @property
    def operator(self) -> str:
        return self.function.__name__.lstrip("_")

    def run(self) -> int:
        """Launches; the bytes of what it reads and writes, each tensor once."""
        result = self.function(*self.arguments)
        moved = {id(x): x for x in _tensors((self.arguments, result))}.values()
        return sum(x.numel() * x.element_size() for x in (*moved, *_tensors(self.arguments[0] if self.updates else ())))


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, (list, tuple)):
        return [tensor for part in x for tensor in _tensors(part)]
    return [x] if isinstance(x, Tensor) else []


def _of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def grpo() -> Iterator[Launch]:
    C = 7936  # columns of a chunk
    row, column = torch.zeros(T), torch.zeros(T, dtype=torch.int64)
    bounds, logits = torch.tensor([0, T], dtype=torch.int32), torch.empty(T, V)
    for width, dtype in ((H, HALF), (4096, HALF), (H, torch.float32)):
        h, w, grad = (torch.empty(*shape, dtype=dtype) for shape in ((T, width), (V, width), (T, C)))
        label, whole, chunk = f"{T} x {width}, {_of(dtype)}", 2.0 * T * V * width, 2.0 * T * C * width
        for entropy in (None, row):
            also = ", entropy" if entropy is not None else ""
            of_rows = (row, entropy, row, entropy, row, column, 0.7, grad)
            flag = entropy is not None
            yield Launch(grpo_kernels.statistics, label + also, (h, w, column, 0.7, flag, C, None), whole)
            yield Launch(grpo_kernels.grad_logits, label + also, (h, w[:C], None, *of_rows), chunk)
            kept = label + also + ", logits kept"
            yield Launch(grpo_kernels.statistics, kept, (h, w, column, 0.7, flag, C, logits), whole)
            yield Launch(grpo_kernels.grad_logits, kept, (h, w[:C], logits[:, :C], *of_rows))
        if dtype == HALF:
            yield Launch(grpo_kernels.accumulate, label, (torch.empty(T, width), grad, w[:C]), chunk, updates=True)
    for cu_seqlens, estimator in itertools.product((None, bounds), ("k1", "k2", "k3")):
        settings = (cu_seqlens, row, 0.2, 0.2, 3.0, 2.0, 0.1, estimator, False)
        ratio = "token" if cu_seqlens is None else "sequence"
        yield Launch(grpo_kernels.grpo_loss, f"{T}, ratio a {ratio}, {estimator}", (*[row] * 5, *settings))


def moe() -> Iterator[Launch]:
    K, E = 8, 256
    P = T * K
    logits, bias = torch.zeros(T, E), torch.zeros(E)
    ids, weights, padding = torch.zeros(T, K, dtype=torch.int64), torch.zeros(T, K), torch.zeros(T, dtype=torch.bool)
    row_map = torch.zeros(P, dtype=torch.int64)
    for score in ("sigmoid", "softmax"):
        yield Launch(
            moe_kernels.route, f"{T} x {E}, {score}", (logits, bias, K, 8, 4, 2.5, score, None, padding, False)
        )
        arguments = (weights, logits, ids, padding, 2.5, score)
        yield Launch(moe_kernels.route_backward, f"{T} x {E}, {score}", arguments)
    replayed = (logits, None, K, 1, 1, 2.5, "sigmoid", ids, None, False)
    yield Launch(moe_kernels.route, f"{T} x {E}, replay", replayed)
    x_TH, x_PH = torch.empty(T, H, dtype=HALF), torch.empty(P, H, dtype=HALF)
    yield Launch(moe_kernels.permute, f"{T} x {H}, top {K}", (x_TH, ids, E, False))
    for w in (None, weights):
        label = f"{P} x {H}" + (", weights" if w is not None else "")
        yield Launch(moe_kernels.unpermute, label, (x_PH, row_map, T, K, w))
        yield Launch(moe_kernels.unpermute_backward, label, (x_TH, x_PH, row_map, K, w))
    counts = torch.full((LOCAL_EXPERTS,), P // LOCAL_EXPERTS)
    for dtype in (HALF, torch.float32):
        shapes = (P, H), (LOCAL_EXPERTS, H, 2 * F), (LOCAL_EXPERTS, F, H), (P, 2 * F)
        x, gate_up, down, middle = (torch.empty(*shape, dtype=dtype) for shape in shapes)
        kind = _of(dtype)
        label = lambda rows, k, n, kind=kind: f"{P} rows, {rows}: {k} x {n}, {kind}"
        first, second = 2.0 * P * H * 2 * F, 2.0 * P * F * H
        gemm, wgrad = moe_kernels.grouped_gemm, moe_kernels.grouped_gemm_wgrad
        yield Launch(gemm, label("gate and up", H, 2 * F), (x, gate_up, counts), first)
        yield Launch(gemm, label("down", F, H), (middle[:, :F], down, counts), second)
        yield Launch(gemm, label("dx", 2 * F, H), (middle, gate_up.transpose(1, 2), counts), first)
        yield Launch(gemm, label("d middle", H, F), (x, down.transpose(1, 2), counts), second)
        yield Launch(wgrad, label("d gate and up", H, 2 * F), (x, middle, counts), first)
        main = torch.empty(LOCAL_EXPERTS, H, 2 * F)
        arguments = (main, x, middle, counts)
        yield Launch(moe_kernels.grouped_gemm_wgrad_, label("main", H, 2 * F), arguments, first, updates=True)
        arguments = (x.view(LOCAL_EXPERTS, -1, H), counts, gate_up, down, None)
        yield Launch(moe_kernels.moe_mlp_masked, f"{P} rows, masked, {_of(dtype)}", arguments, first + second)
    for w in (None, torch.zeros(P)):
        x = torch.empty(P, 2 * F, dtype=HALF)
        label = f"{P} x {2 * F}" + (", weights" if w is not None else "")
        grad = torch.empty(P, F, dtype=HALF)
        yield Launch(moe_kernels.swiglu, label, (x, w))
        yield Launch(moe_kernels._swiglu_backward, label, (grad, x, w, w is not None))


def fp8() -> Iterator[Launch]:
    E = LOCAL_EXPERTS
    up = lambda n: -(-n // 128)
    values = lambda *shape: torch.empty(shape, dtype=E4M3)
    scales = lambda rows, columns: torch.empty(up(columns), rows).t()
    squares = lambda *shape: torch.empty((*shape[:-2], up(shape[-2]), up(shape[-1])))
    for source in (torch.empty(T, H, dtype=HALF), torch.empty(T, H)):
        label = f"{T} x {H}, {_of(source.dtype)}"
        for power_of_two in (False, True):
            form = label + (", powers of two" if power_of_two else "")
            for quantise in (fp8_kernels.quantize_1x128, fp8_kernels.quantize_128x128, fp8_kernels.quantize_both):
                yield Launch(quantise, form, (source, power_of_two))
        gate_up, grad = source[:, : 2 * F], source[:, :F].contiguous()
        for weights in (None, torch.empty(T)):
            form = f"{T} x {2 * F}, {_of(source.dtype)}" + (", weights" if weights is not None else "")
            for across in (False, True):
                both = ", both copies" if across else ""
                yield Launch(fp8_kernels.swiglu_quantize, form + both, (gate_up, weights, across, False))
            if source.dtype == HALF:
                yield Launch(fp8_kernels.swiglu_backward_quantize, form, (grad, gate_up, weights, False))
        for across in (False, True):
            form = label + (", both copies" if across else "")
            yield Launch(fp8_kernels.rms_norm_quantize, form, (source, torch.empty(H), 1e-6, across, False))
        weight = torch.empty(E, H, 2 * F, dtype=source.dtype)
        yield Launch(fp8_kernels.quantize_weight, f"{E} x {H} x {2 * F}, {_of(source.dtype)}", (weight,))
    counts = torch.full((E,), T // E)
    for N, K in ((2112, H), (24576, 1536), (2 * F, H), (H, F)):
        label, flops = f"{T} x {N} x {K}", 2.0 * T * N * K
        a, b = (values(T, K), scales(T, K)), (values(N, K), squares(N, K))
        for dtype in (HALF, torch.float32):
            yield Launch(fp8_kernels.fp8_gemm, f"{label}, {_of(dtype)}", (*a, *b, dtype), flops)
        yield Launch(fp8_kernels.fp8_gemm, f"{label}, dx", (*a, b[0], squares(K, N).t(), HALF), flops)
        across = values(N, T), scales(N, T), values(K, T), scales(K, T)
        yield Launch(fp8_kernels.fp8_gemm_wgrad, label, (*across, torch.float32), flops)
        yield Launch(fp8_kernels.fp8_gemm_wgrad_, label, (torch.empty(N, K), *across), flops, updates=True)
    label = f"{E} experts, {label}"  # the last of these sizes
    weight, table, turned = values(E, N, K), squares(E, N, K), squares(E, K, N).transpose(1, 2)
    yield Launch(fp8_kernels.fp8_grouped_gemm, label, (*a, weight, table, counts, HALF), flops)
    yield Launch(fp8_kernels.fp8_grouped_gemm, f"{label}, dx", (*a, weight, turned, counts, HALF), flops)
    yield Launch(fp8_kernels.fp8_grouped_gemm_wgrad, label, (*across, counts, torch.float32), flops)
    main = torch.empty(E, N, K)
    yield Launch(fp8_kernels.fp8_grouped_gemm_wgrad_, label, (main, *across, counts), flops, updates=True)


def norm() -> Iterator[Launch]:
    for dtype in (HALF, torch.float32):
        latents = torch.empty(T, 512 + 64, dtype=dtype)
        widths = (H, 1536, 4095, 16383) if dtype == HALF else (H, 4095)
        for x in (*(torch.empty(T, width, dtype=dtype) for width in widths), latents[:, :512]):
            label, weight = f"{T} x {x.shape[1]}, {_of(dtype)}", torch.empty(x.shape[1], dtype=dtype)
            yield Launch(norm_kernels.rms_norm, label, (x, weight, 1e-6))
            arguments = (torch.empty(x.shape, dtype=dtype), x, weight, torch.empty(T, 1))
            yield Launch(norm_kernels.rms_norm_backward, label, arguments)
        query = torch.empty(T, 128, 128 + 64, dtype=dtype)[..., 128:]
        dense = torch.empty(T, 64, 128, dtype=dtype)
        for x, interleaved in ((query, True), (latents[:, None, 512:], True), (dense, False)):
            tables = torch.empty(T, x.shape[2] // 2), torch.empty(T, x.shape[2] // 2)
            for inverse in (False, True) if x is query else (False,):
                label = f"{' x '.join(map(str, x.shape))}, {_of(dtype)}" + (", back" if inverse else "")
                yield Launch(norm_kernels.apply_rope, label, (x, *tables, interleaved, inverse))


def optim() -> Iterator[Launch]:
    shapes = [(H,), (512,), (2 * F, H), (H, F), (7, 5)]
    of = lambda dtype: [torch.empty(shape, dtype=dtype) for shape in shapes]

    def adamw_step(updated: list[list[Tensor]], grads: list[Tensor], params: list[Tensor], stochastic: bool) -> None:
        """Moments and weights are read and written; parameters only written, where the weights are their masters."""
        first, second, weights = updated
        masters, numbers = weights if params else [], (1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, stochastic, 0)
        optim_kernels.adamw_step(params or weights, grads, first, second, masters, *numbers)

    count = f"{sum(x.numel() for x in of(HALF))} parameters in {len(shapes)} tensors"
    for moments in (HALF, torch.float32):
        label = f"{count}, moments {_of(moments)}, "
        updated = [of(moments), of(moments), of(torch.float32)]
        yield Launch(adamw_step, label + "masters", (updated, of(torch.float32), of(HALF), False), updates=True)
        yield Launch(adamw_step, label + "float32", (updated, of(torch.float32), [], False), updates=True)
        updated = [*updated[:2], of(HALF)]
        yield Launch(adamw_step, label + "stochastic rounding", (updated, of(HALF), [], True), updates=True)
    for dtype in (HALF, torch.float32):
        yield Launch(optim_kernels.grad_norm, f"{count}, {_of(dtype)}", (of(dtype),))


def mla() -> Iterator[Launch]:
    """DeepSeek-V3's 128 heads of 192 = 128 + 64 and 128, grouped heads of 128 and 64, smaller ones of latent attention;
    decoding 128 sequences of 4096 tokens."""
    forward, backward = mla_kernels.mla_attention, mla_kernels.mla_attention_backward
    bounds = torch.tensor([0, T], dtype=torch.int32)
    latent, grouped, narrow = (128, 128, 128, 64, 128), (64, 8, 128, 0, 128), (14, 2, 64, 0, 64)
    small = (4, 4, 32, 16, 32)  # wider ones in float32 are left to torch
    for shape, dtype in ((latent, HALF), (grouped, HALF), (narrow, HALF), (small, torch.float32)):
        N, M, own, rope, value = shape
        kv = torch.empty(T, M, own + value, dtype=dtype)
        q, grad = torch.empty(T, N, own + rope, dtype=dtype), torch.empty(T, N, value, dtype=dtype)
        k_rope = torch.empty(T, rope, dtype=dtype) if rope else None
        operands = (*kv.split([own, value], -1), k_rope)
        label = f"{T}, {N} heads of {own + rope}/{value}, {M} of keys, {_of(dtype)}"
        work, width = 1.0 * N * T * (T + 1), own + rope  # half of the square, two operations each
        rest = (bounds, T, None, width**-0.5, True)
        yield Launch(forward, label, (q, *operands, *rest), work * (width + value))
        arguments = (grad, q, *operands, grad, torch.empty(T, N), *rest)
        yield Launch(backward, label, arguments, work * (3 * width + 2 * value))
        if shape is not latent:
            continue
        few = torch.arange(T // 2, T // 2 + 512)
        rest, part = (bounds, T, few, width**-0.5, True), f"512 rows of {label}"
        seen = 2.0 * N * float((few + 1).sum())
        yield Launch(forward, part, (q[:512], *operands, *rest), seen * (width + value))
        arguments = (grad[:512], q[:512], *operands, grad[:512], torch.empty(512, N), *rest)
        yield Launch(backward, part, arguments, seen * (3 * width + 2 * value))
    B, L, page = 128, 4096, 64
    table, lens = torch.zeros(B, L // page, dtype=torch.int32), torch.full((B,), L, dtype=torch.int32)
    for dtype, N, R, rope in ((HALF, 128, 512, 64), (HALF, 16, 512, 64), (torch.float32, 16, 128, 64)):
        q, cache = torch.empty(B, N, R + rope, dtype=dtype), torch.empty(B * L // page, page, R + rope, dtype=dtype)
        label = f"{B} x {L}, {N} heads of {R + rope}/{R}, {_of(dtype)}"
        work = 2.0 * B * L * N * (2 * R + rope)
        yield Launch(mla_kernels.mla_decode, label, (q, cache, table, lens, 0.1, R), work)
        keys = torch.empty(L, 1, R + rope, dtype=dtype)
        arguments = (torch.empty(L, N, R + rope, dtype=dtype), keys, keys[..., :R], None, torch.tensor([0, L]), L, None)
        label = f"exact, {L} queries, {N} heads of {R + rope}/{R}, {_of(dtype)}"
        yield Launch(numerics("exact")(mla_kernels.mla_attention), label, (*arguments, 0.1, True), work / B * L / 2)
        rows = torch.empty(B, R + rope, dtype=dtype)
        yield Launch(mla_kernels.append_kv, f"{B} x {R + rope}, {_of(dtype)}", (cache, rows, table, lens - 1))
    for dtype, N, R, rope in ((HALF, 128, 512, 64), (HALF, 16, 512, 64), (torch.float32, 16, 128, 64)):
        size = fp8_latent_bytes(R, rope)
        q, cache = torch.empty(B, N, R + rope, dtype=dtype), torch.empty(B * L // page, page, size, dtype=torch.uint8)
        label = f"{B} x {L}, {N} heads of {R + rope}/{R}, {_of(dtype)}, FP8 cache"
        work = 2.0 * B * L * N * (2 * R + rope)
        yield Launch(mla_kernels.mla_decode, label, (q, cache, table, lens, 0.1, R), work)
        rows = torch.empty(B, R + rope, dtype=dtype)
        yield Launch(
            mla_kernels.append_kv, f"{B} x {R + rope}, {_of(dtype)}, FP8 cache", (cache, rows, table, lens - 1)
        )
    for dtype in (HALF, torch.float32):
        q, cache = torch.empty(B, 64, 128, dtype=dtype), torch.empty(B * L // page, page, 8, 128, dtype=dtype)
        arguments = (q, cache, torch.empty_like(cache), table, lens, 0.1)
        label = f"{B} x {L}, 64 heads of 128, 8 of keys, {_of(dtype)}"
        yield Launch(mla_kernels.gqa_decode, label, arguments, 4.0 * B * L * 64 * 128)
