"""r1's operators: each usable alone, on tensors. One folder a family; backend.py says how a backend is chosen."""

from r1.kernels.fp8 import (
    dequantize,
    fp8_gemm,
    fp8_gemm_wgrad,
    fp8_grouped_gemm,
    fp8_grouped_gemm_wgrad,
    fp8_linear,
    quantize_1x128,
    quantize_128x128,
    quantize_both,
)
from r1.kernels.grpo import (
    aggregation_weights,
    group_advantages,
    grpo_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_logprob,
)
from r1.kernels.mla import append_kv, gqa_decode, mla_attention, mla_decode
from r1.kernels.moe import (
    grouped_gemm,
    grouped_gemm_wgrad_,
    moe_layer,
    moe_mlp,
    moe_mlp_masked,
    permute,
    route,
    sequence_balance_loss,
    swiglu,
    unpermute,
)
from r1.kernels.norm import apply_rope, rms_norm, rope_tables, yarn_softmax_scale
from r1.kernels.optim import adamw_step, grad_norm

__all__ = [
    "adamw_step",
    "aggregation_weights",
    "append_kv",
    "apply_rope",
    "dequantize",
    "fp8_gemm",
    "fp8_gemm_wgrad",
    "fp8_grouped_gemm",
    "fp8_grouped_gemm_wgrad",
    "fp8_linear",
    "gqa_decode",
    "grad_norm",
    "group_advantages",
    "grouped_gemm",
    "grouped_gemm_wgrad_",
    "grpo_loss",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_logprob",
    "mla_attention",
    "mla_decode",
    "moe_layer",
    "moe_mlp",
    "moe_mlp_masked",
    "permute",
    "quantize_128x128",
    "quantize_both",
    "quantize_1x128",
    "rms_norm",
    "rope_tables",
    "route",
    "sequence_balance_loss",
    "swiglu",
    "unpermute",
    "yarn_softmax_scale",
]
