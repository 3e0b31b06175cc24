"""The moe family in plain torch; its routing and permutation are in reference_route.py.

Letters: T tokens, H hidden, E experts, K experts a token, P = T K rows sorted by expert, F width of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1.kernels.backend import wide
from r1.kernels.exact import product, silu
from r1.kernels.moe.reference_route import (
    check_route_values,
    checked_ids,
    permute,
    route,
    route_backward,
    sort,
    token_of,
    unpermute,
    unpermute_backward,
)

# Experts are taken in spans, a few at a time: a product for each, and between the products one operation for all. Many
# small experts then cost little more than one large one, and what is between stays in the cache if an expert's rows do.
SPAN_BYTES = 2**21  # the second-level caches of two cores, roughly

_silu_backward = torch.ops.aten.silu_backward.grad_input


def checked_counts(tokens_per_expert_E: Tensor, P: int) -> list[int]:
    counts = tokens_per_expert_E.tolist()
    if sum(counts) != P or min(counts, default=0) < 0:
        raise ValueError(f"tokens_per_expert_E is {counts}, wanted numbers >= 0 whose sum is the {P} rows")
    return counts


def checked_masked_counts(tokens_per_expert_E: Tensor, room: int) -> list[int]:
    counts = tokens_per_expert_E.tolist()
    if not all(0 <= count <= room for count in counts):
        raise ValueError(f"tokens_per_expert_E is {counts}, wanted numbers from 0 to the {room} rows of an expert")
    return counts


def _groups(tokens_per_expert_E: Tensor, P: int, *tensors: Tensor) -> list[tuple]:
    """(expert, then each tensor's rows of that expert) for the experts that have any."""
    counts = checked_counts(tokens_per_expert_E, P)
    parts = zip(*(t.split(counts) for t in tensors))
    return [(e, *rows) for e, (count, rows) in enumerate(zip(counts, parts)) if count]


def grouped_gemm(x_PH: Tensor, weight_EHF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    out_PF = x_PH.new_empty(x_PH.shape[0], weight_EHF.shape[2])
    for e, x, out in _groups(tokens_per_expert_E, len(x_PH), x_PH, out_PF):
        product(x, weight_EHF[e], out)
    return out_PF


def grouped_gemm_wgrad(x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """x.T @ grad for every expert (E, H, F); exactly zero for an expert with no rows."""
    weight_EHF = x_PH.new_empty(len(tokens_per_expert_E), x_PH.shape[1], grad_PF.shape[1])
    _wgrad(weight_EHF, x_PH, grad_PF, tokens_per_expert_E, accumulate=False)
    return weight_EHF


def grouped_gemm_wgrad_(out_EHF: Tensor, x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor) -> None:
    """Adds x.T @ grad of every expert to out."""
    _wgrad(out_EHF, x_PH, grad_PF, tokens_per_expert_E, accumulate=True)


def _wgrad(
    out_EHF: Tensor | None, x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor, accumulate: bool
) -> None:
    if out_EHF is None:
        return
    groups = _groups(tokens_per_expert_E, len(x_PH), x_PH, grad_PF)
    for e, x, grad in groups:
        _weight_product(x, grad, out_EHF[e], accumulate)
    if not accumulate:
        _zero_others([group[0] for group in groups], out_EHF)


def _weight_product(x: Tensor, grad: Tensor, out: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.addmm_(x.t().to(out.dtype), grad.to(out.dtype))
    else:
        torch.mm(x.t(), grad, out=out)


def _zero_others(experts: list[int], gradient_EHF: Tensor) -> None:
    for e in set(range(len(gradient_EHF))).difference(experts):
        gradient_EHF[e].zero_()


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.to(wide(gate_up)).chunk(2, -1)
    out = silu(gate).mul_(up)
    if weights is not None:
        out.mul_(weights[..., None])
    return out.to(gate_up.dtype).contiguous()


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(d gate_up, d weights or an empty tensor), with the activation made again rather than kept."""
    dtype = wide(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, -1)
    grad = grad.to(dtype)
    activation = torch.nn.functional.silu(gate)
    grad_weights = gate_up.new_empty(0)
    if weights is not None:
        grad_weights = (grad * up).mul_(activation).sum(-1).to(weights.dtype)
        grad = grad * weights.to(dtype)[..., None]
    grad_gate_up = torch.empty_like(gate_up, dtype=dtype, memory_format=torch.contiguous_format)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    torch.mul(grad, activation, out=grad_up)
    _silu_backward(grad * up, gate, grad_input=grad_gate)
    return grad_gate_up.to(gate_up.dtype), grad_weights


class Span(NamedTuple):
    """Consecutive experts: where their rows are, which of them have any, and how many."""

    rows: slice
    experts: list[int]
    sizes: list[int]


def _spans(tokens_per_expert_E: Tensor, P: int, row_bytes: int) -> list[Span]:
    found: list[Span] = []
    end, most = 0, SPAN_BYTES // max(row_bytes, 1)
    for e, count in enumerate(checked_counts(tokens_per_expert_E, P)):
        if not count:
            continue
        begin, end = end, end + count
        if found and end - found[-1].rows.start <= most:
            last = found.pop()
            found.append(Span(slice(last.rows.start, end), [*last.experts, e], [*last.sizes, count]))
        else:
            found.append(Span(slice(begin, end), [e], [count]))
    return found


def _products(span: Span, a: Tensor, weights: tuple[Tensor, ...], out: Tensor) -> None:
    """out = a @ weights[e], for each expert's rows."""
    for e, rows, into in zip(span.experts, a.split_with_sizes(span.sizes), out.split_with_sizes(span.sizes)):
        product(rows, weights[e], into)


def _weight_products(span: Span, a: Tensor, b: Tensor, out: Tensor | None, accumulate: bool) -> None:
    """out[e] = a.T @ b over each expert's rows, or that added to it; nothing if nobody wants it."""
    if out is None:
        return
    for e, rows, others in zip(span.experts, a.split_with_sizes(span.sizes), b.split_with_sizes(span.sizes)):
        _weight_product(rows, others, out[e], accumulate)


def _take(x: Tensor, token_P: Tensor | None, span: Span, buffer: Tensor) -> Tensor:
    """The span's rows: x's own, or copied from where token_P says."""
    if token_P is None:
        return x[span.rows]
    return torch.index_select(x, 0, token_P[span.rows], out=buffer[: sum(span.sizes)])


def _buffers(like: Tensor, parts: list[Span], *widths: int) -> list[Tensor]:
    longest = max((sum(part.sizes) for part in parts), default=0)
    return [like.new_empty(longest, width) for width in widths]


def _experts(
    x: Tensor,
    token_P: Tensor | None,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y_PH, the first product). Row p is x[p], or x[token_P[p]] if token_P is given."""
    P, H, F = len(x) if token_P is None else len(token_P), x.shape[1], down_EFH.shape[1]
    if x.dtype != wide(x):
        x_PH = x if token_P is None else x.index_select(0, token_P)
        gate_up_PF = grouped_gemm(x_PH, gate_up_EHF, tokens_per_expert_E)
        return grouped_gemm(swiglu(gate_up_PF, weights_P), down_EFH, tokens_per_expert_E), gate_up_PF
    gate_up_PF, y_PH = x.new_empty(P, 2 * F), x.new_empty(P, H)
    parts = _spans(tokens_per_expert_E, P, (2 * H + 3 * F) * x.element_size())
    x_buffer, middle_buffer = _buffers(x, parts, 0 if token_P is None else H, F)
    first, second = gate_up_EHF.unbind(), down_EFH.unbind()
    weights_P1 = None if weights_P is None else weights_P.to(x.dtype)[:, None]
    for span in parts:
        gate_up = gate_up_PF[span.rows]
        _products(span, _take(x, token_P, span, x_buffer), first, gate_up)
        gate, up = gate_up.split(F, -1)
        middle = silu(gate, middle_buffer[: len(gate)]).mul_(up)
        if weights_P1 is not None:
            middle.mul_(weights_P1[span.rows])
        _products(span, middle, second, y_PH[span.rows])
    return y_PH, gate_up_PF


def _experts_backward(
    grad: Tensor,
    x: Tensor,
    token_P: Tensor | None,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None,
    gate_up_PF: Tensor,
    grad_gate_up_EHF: Tensor | None,
    grad_down_EFH: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """(d x_PH, d weights_P or an empty tensor); grad's rows are found as x's are."""
    if x.dtype != wide(x):
        grad_PH, x_PH = (y if token_P is None else y.index_select(0, token_P) for y in (grad, x))
        grad_middle_PF = grouped_gemm(grad_PH, down_EFH.transpose(1, 2), tokens_per_expert_E)
        middle_PF = swiglu(gate_up_PF, weights_P)
        _wgrad(grad_down_EFH, middle_PF, grad_PH, tokens_per_expert_E, accumulate)
        grad_gate_up_PF, grad_weights_P = swiglu_backward(grad_middle_PF, gate_up_PF, weights_P)
        _wgrad(grad_gate_up_EHF, x_PH, grad_gate_up_PF, tokens_per_expert_E, accumulate)
        return grouped_gemm(grad_gate_up_PF, gate_up_EHF.transpose(1, 2), tokens_per_expert_E), grad_weights_P
    (P, _), H, F = gate_up_PF.shape, x.shape[1], down_EFH.shape[1]
    grad = grad.contiguous()
    grad_x_PH, grad_weights_P1 = x.new_empty(P, H), x.new_empty(P, 1)
    weights_P1 = None if weights_P is None else weights_P.to(x.dtype)[:, None]
    parts = _spans(tokens_per_expert_E, P, (3 * H + 7 * F) * x.element_size())
    sorted_width = 0 if token_P is None else H
    buffers = _buffers(x, parts, sorted_width, sorted_width, F, F, F, 2 * F)
    first, second = gate_up_EHF.transpose(1, 2).unbind(), down_EFH.transpose(1, 2).unbind()
    for span in parts:
        grad_rows, x_rows = _take(grad, token_P, span, buffers[0]), _take(x, token_P, span, buffers[1])
        grad_middle, activation, middle, grad_first = (buffer[: len(x_rows)] for buffer in buffers[2:])
        gate, up = gate_up_PF[span.rows].split(F, -1)
        grad_gate, grad_up = grad_first.split(F, -1)
        _products(span, grad_rows, second, grad_middle)
        torch.mul(silu(gate, activation), up, out=middle)
        if weights_P1 is not None:
            torch.sum(torch.mul(grad_middle, middle, out=grad_up), -1, True, out=grad_weights_P1[span.rows])
            middle.mul_(weights_P1[span.rows])
            grad_middle.mul_(weights_P1[span.rows])
        _weight_products(span, middle, grad_rows, grad_down_EFH, accumulate)
        torch.mul(grad_middle, activation, out=grad_up)
        _silu_backward(grad_middle.mul_(up), gate, grad_input=grad_gate)
        _weight_products(span, x_rows, grad_first, grad_gate_up_EHF, accumulate)
        _products(span, grad_first, first, grad_x_PH[span.rows])
    for gradient in (grad_gate_up_EHF, grad_down_EFH):
        if gradient is not None and not accumulate:
            _zero_others([e for span in parts for e in span.experts], gradient)
    if weights_P is None:
        return grad_x_PH, x.new_empty(0)
    return grad_x_PH, grad_weights_P1[:, 0].to(weights_P.dtype)


def moe_mlp(
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None,
    *main_gradients: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y_PH, the first product). Main gradients are for the backward."""
    return _experts(x_PH, None, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P)


def moe_mlp_masked(
    x_EMH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_EM: Tensor | None,
) -> Tensor:
    y_EMH = torch.empty_like(x_EMH, memory_format=torch.contiguous_format)
    for e, count in enumerate(checked_masked_counts(tokens_per_expert_E, x_EMH.shape[1])):
        if count:
            weights = None if weights_EM is None else weights_EM[e, :count]
            middle = swiglu(product(x_EMH[e, :count], gate_up_EHF[e]), weights)
            product(middle, down_EFH[e], y_EMH[e, :count])
    return y_EMH


def moe_mlp_backward(grad_PH: Tensor, x_PH: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(d x, d weights_P or an empty tensor); writes the weights' gradients, or adds them if told to accumulate."""
    return _experts_backward(grad_PH, x_PH, None, *rest)


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    check_values: bool,
    *main_gradients: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out_TH, then what the backward needs: the row map, tokens per expert, the first product)."""
    T, K = ids_TK.shape
    row_map_P, counts_E = sort(ids_TK, len(gate_up_EHF), check_values)
    weights_P = weights_TK.reshape(-1).index_select(0, row_map_P)
    y_PH, gate_up_PF = _experts(x_TH, token_of(row_map_P, ids_TK), counts_E, gate_up_EHF, down_EFH, weights_P)
    return unpermute(y_PH, row_map_P, T, K, None), row_map_P, counts_E, gate_up_PF


def moe_layer_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    row_map_P: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_PF: Tensor,
    grad_gate_up_EHF: Tensor | None,
    grad_down_EFH: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """(d x, d weights_TK); the weights' gradients as in moe_mlp_backward."""
    T, K = weights_TK.shape
    weights_P = weights_TK.reshape(-1).index_select(0, row_map_P)
    grad_x_PH, grad_weights_P = _experts_backward(
        grad_TH, x_TH, token_of(row_map_P, weights_TK), tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P,
        gate_up_PF, grad_gate_up_EHF, grad_down_EFH, accumulate,
    )  # fmt: skip
    grad_weights = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    grad_weights.view(-1).index_copy_(0, row_map_P, grad_weights_P)
    return unpermute(grad_x_PH, row_map_P, T, K, None), grad_weights


__all__ = [
    "check_route_values",
    "checked_counts",
    "checked_ids",
    "checked_masked_counts",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "grouped_gemm_wgrad_",
    "moe_layer",
    "moe_layer_backward",
    "moe_mlp",
    "moe_mlp_backward",
    "moe_mlp_masked",
    "permute",
    "route",
    "route_backward",
    "swiglu",
    "swiglu_backward",
    "token_of",
    "unpermute",
    "unpermute_backward",
]
