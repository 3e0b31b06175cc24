"""The fp8 family's operators as torch.library knows them: schemas and shapes; layers.py has those made of them.

Called with every argument, unchecked; the functions that check are the package's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1.kernels.backend import operator
from r1.kernels.fp8.reference import BLOCK, nothing, row_scales_like, values_like


def up(n: Any) -> Any:
    """How many blocks n numbers fill."""
    return (n + BLOCK - 1) // BLOCK


def _rows_fake(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return values_like(x, *x.shape), row_scales_like(x, *x.shape)


def _squares(w: Tensor) -> Tensor:
    *lead, N, K = w.shape
    return w.new_empty((*lead, up(N), up(K)), dtype=torch.float32)


def _both_fake(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_rows_fake(x, power_of_two), *_rows_fake(x.t(), power_of_two)


def _swiglu_fake(x: Tensor, weights: Tensor | None, across: bool, power_of_two: bool) -> tuple[Tensor, ...]:
    return _copies_fake(x.new_empty((x.shape[0], x.shape[1] // 2)), across)


def _copies_fake(x: Tensor, across: bool) -> tuple[Tensor, ...]:
    copies = _both_fake(x, False)
    return copies if across else (*copies[:2], *nothing(x))


quantize_1x128 = operator("fp8", "quantize_1x128(Tensor x_MK, bool power_of_two) -> (Tensor, Tensor)", _rows_fake)
quantize_128x128 = operator(
    "fp8",
    "quantize_128x128(Tensor w_NK, bool power_of_two) -> (Tensor, Tensor)",
    lambda w, power_of_two: (values_like(w, *w.shape), _squares(w)),
)
quantize_both = operator(
    "fp8", "quantize_both(Tensor x_MK, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)", _both_fake
)
quantize_weight = operator(
    "fp8",
    "quantize_weight(Tensor weight) -> (Tensor, Tensor, Tensor)",
    lambda w: (values_like(w, *w.shape), _squares(w), values_like(w, *w.transpose(-1, -2).shape)),
)
swiglu_quantize = operator(
    "fp8",
    "swiglu_quantize(Tensor gate_up_MF, Tensor? weights_M, bool across, bool power_of_two) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _swiglu_fake,
)
swiglu_backward_quantize = operator(
    "fp8",
    "swiglu_backward_quantize(Tensor grad_MF, Tensor gate_up_MF, Tensor? weights_M, bool power_of_two) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, weights, power_of_two: (
        *_both_fake(x, power_of_two),
        x.new_empty(0 if weights is None else weights.shape, dtype=torch.float32),
    ),
)
rms_norm_quantize = operator(
    "fp8",
    "rms_norm_quantize(Tensor x_MH, Tensor weight_H, float eps, bool across, bool power_of_two) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, weight, eps, across, power_of_two: (
        *_copies_fake(x, across), x.new_empty((x.shape[0], 1), dtype=torch.float32)
    ),
)  # fmt: skip
dequantize = operator(
    "fp8",
    "dequantize(Tensor q_MK, Tensor scales, int rows, int columns, ScalarType dtype) -> Tensor",
    lambda q, scales, rows, columns, dtype: q.new_empty(q.shape, dtype=dtype),
)
fp8_gemm = operator(
    "fp8",
    "fp8_gemm(Tensor a_q_MK, Tensor a_s, Tensor b_q_NK, Tensor b_s, ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
)
fp8_gemm_wgrad = operator(
    "fp8",
    "fp8_gemm_wgrad(Tensor a_q_NM, Tensor a_s, Tensor b_q_KM, Tensor b_s, ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
)
fp8_gemm_wgrad_ = operator(
    "fp8",
    "fp8_gemm_wgrad_(Tensor(a!) out_NK, Tensor a_q_NM, Tensor a_s, Tensor b_q_KM, Tensor b_s) -> ()",
    lambda *_: None,
)
fp8_grouped_gemm = operator(
    "fp8",
    "fp8_grouped_gemm(Tensor a_q_PK, Tensor a_s, Tensor b_q_ENK, Tensor b_s, Tensor tokens_per_expert_E, "
    "ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, counts, dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
)
fp8_grouped_gemm_wgrad = operator(
    "fp8",
    "fp8_grouped_gemm_wgrad(Tensor a_q_NP, Tensor a_s, Tensor b_q_KP, Tensor b_s, Tensor tokens_per_expert_E, "
    "ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, counts, dtype: a.new_empty((counts.shape[0], a.shape[0], b.shape[0]), dtype=dtype),
)
fp8_grouped_gemm_wgrad_ = operator(
    "fp8",
    "fp8_grouped_gemm_wgrad_(Tensor(a!) out_ENK, Tensor a_q_NP, Tensor a_s, Tensor b_q_KP, Tensor b_s, "
    "Tensor tokens_per_expert_E) -> ()",
    lambda *_: None,
)
