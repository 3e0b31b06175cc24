"""The grpo family: log-probabilities and losses straight from hidden states, with the logits never whole in memory.

Letters: T packed tokens, H hidden, V vocabulary (this rank's rows under tensor parallelism), S sequences, G group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from r1.kernels.backend import operator, register, require, wide
from r1.kernels.grpo import reference

register("grpo", "torch", reference, proven_on=("cpu", "cuda"))
register("grpo", "triton", "r1.kernels.grpo.triton", proven_on=())

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")
RATIOS = ("token", "sequence")

# How many float32 logits may exist at a time where the caller does not say, and the narrowest span of the vocabulary
# on which the matrix products do not starve.
LOGITS_ON_CPU = 2**24
LOGITS_ON_GPU = 2**26
MIN_SPAN = 128


def _logprob_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, *rest: Any
) -> tuple[Tensor, ...]:
    T, dtype, keep_logits = hidden.shape[0], wide(hidden, weight), rest[-1]
    per_token = (hidden.new_empty(n, dtype=dtype) for n in (T, T if entropy else 0, T))
    count = torch.empty((), dtype=torch.int64, device="cpu")
    return *per_token, count, hidden.new_empty(T if keep_logits else 0, weight.shape[0], dtype=dtype)


def _logprob_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, temperature, ctx.want_entropy, *rest = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])
    ctx.options = (temperature, *rest[:-2])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _logprob_backward(
    ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None, *_: Any
) -> tuple:
    want = ctx.needs_input_grad[:2]
    grads = _linear_logprob_backward(
        grad, grad_entropy if ctx.want_entropy else None, grad_lse, *ctx.saved_tensors, *ctx.options, *want
    )
    return (*(g if w else None for g, w in zip(grads, want)), *[None] * 9)


def _logprob_backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    hidden, weight, (want_hidden, want_weight) = args[3], args[4], args[-2:]
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if want_weight else (0, weight.shape[1])),
    )


_linear_logprob = operator(
    "grpo",
    "linear_logprob(Tensor hidden_TH, Tensor weight_VH, Tensor targets_T, float temperature, bool want_entropy, "
    "int ignore_index, SymInt chunk_tokens, SymInt vocab_size, str group_name, bool check_values, bool keep_logits) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _logprob_fake,
    _logprob_save,
    _logprob_backward,
)
_linear_logprob_backward = operator(
    "grpo",
    "linear_logprob_backward(Tensor? grad_logprobs_T, Tensor? grad_entropy_T, Tensor? grad_lse_T, Tensor hidden_TH, "
    "Tensor weight_VH, Tensor targets_T, Tensor entropy_T, Tensor lse_T, Tensor count, Tensor kept_TV, "
    "float temperature, int ignore_index, SymInt chunk_tokens, SymInt vocab_size, str group_name, bool want_hidden, "
    "bool want_weight) -> (Tensor, Tensor)",
    _logprob_backward_fake,
)
_grpo_loss = operator(
    "grpo",
    "grpo_loss(Tensor logprobs_T, Tensor old_logprobs_T, Tensor? reference_logprobs_T, Tensor advantages_T, "
    "Tensor token_weights_T, Tensor? cu_seqlens, Tensor? rollout_logprobs_T, float clip_low, float clip_high, "
    "float? ratio_max, float? importance_cap, float kl_coefficient, str kl_estimator, bool check_values) "
    "-> (Tensor, Tensor, Tensor)",
    lambda logprobs, *_: (
        logprobs.new_empty((), dtype=wide(logprobs)),
        logprobs.new_empty(len(reference.METRICS), dtype=wide(logprobs)),
        torch.empty_like(logprobs),
    ),
    lambda ctx, inputs, output: ctx.save_for_backward(output[2]),
    lambda ctx, grad, *_: ((grad * ctx.saved_tensors[0]).to(ctx.saved_tensors[0].dtype), *[None] * 13),
)


def linear_logprob(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    temperature: float = 1.0,
    *,
    return_entropy: bool = False,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    check_values: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets: logprobs_T, and with return_entropy (…, entropy_T).

    hidden_TH and weight_VH are floating tensors, targets_T int64. The result is float32 (float64 if an input is), with
    products accumulated in that type. Both outputs are differentiable. Where targets_T is ignore_index both are 0 and
    nothing is computed.

    chunk_tokens bounds the memory: as many logits exist at a time as that many tokens have (default: 64 MB of them on a
    CPU, 256 MB on a GPU). If that is all of them they are kept for the backward (3 matrix products in all); otherwise
    the vocabulary is walked through in spans, and the backward makes each span again (4).

    With tp_group, weight_VH is this rank's slice of the vocabulary, of equal size on all ranks and in rank order;
    hidden_TH, targets_T and the incoming gradients are the same on all ranks, and the gradient of hidden_TH is summed
    over them. Rows of the head from vocab_size (global) on are padding and take no part.

    Raises ValueError for a wrong shape, type, device, temperature or chunk, or a target outside the vocabulary. To see
    the targets, and to leave out the ignored ones, the host waits for a GPU once a call. check_values=False does not
    wait: ignored tokens then cost what others do, and a target outside the vocabulary gets NaN.
    """
    logprobs_T, entropy_T, _ = _run_linear_logprob(
        hidden_TH, weight_VH, targets_T, temperature, return_entropy, ignore_index, chunk_tokens, tp_group, vocab_size,
        check_values,
    )  # fmt: skip
    return (logprobs_T, entropy_T) if return_entropy else logprobs_T


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    check_values: bool = True,
) -> Tensor:
    """Cross-entropy per token, loss_T, from hidden states and the head's weight; 0 where targets_T is ignore_index.

    z_loss times the squared log-sum-exp of the logits is added (PaLM, arXiv 2204.02311, section 5). All else, and what
    is raised, is as in linear_logprob.
    """
    require(z_loss >= 0, "z_loss", z_loss, "a number >= 0")
    logprobs_T, _, lse_T = _run_linear_logprob(
        hidden_TH, weight_VH, targets_T, 1.0, False, ignore_index, chunk_tokens, tp_group, vocab_size, check_values
    )
    if not z_loss:
        return -logprobs_T
    return z_loss * lse_T.square().masked_fill(targets_T == ignore_index, 0) - logprobs_T


def _run_linear_logprob(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    temperature: float,
    return_entropy: bool,
    ignore_index: int,
    chunk_tokens: int | None,
    tp_group: torch.distributed.ProcessGroup | None,
    vocab_size: int | None,
    check_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require(hidden_TH.dim() == 2 and hidden_TH.is_floating_point(), "hidden_TH", hidden_TH, "a floating (T, H) tensor")
    T, H = hidden_TH.shape
    require(
        weight_VH.dim() == 2 and weight_VH.shape[1] == H and weight_VH.is_floating_point(),
        "weight_VH", weight_VH, f"a floating (V, {H}) tensor",
    )  # fmt: skip
    require(
        targets_T.shape == (T,) and targets_T.dtype == torch.int64, "targets_T", targets_T, f"an int64 ({T},) tensor"
    )
    for name, tensor in (("hidden_TH", hidden_TH), ("weight_VH", weight_VH)):
        require(
            not isinstance(tensor, DTensor),
            name, tensor, "a plain tensor: call this inside the forward of the module that FSDP wraps",
        )  # fmt: skip
    for name, tensor in (("weight_VH", weight_VH), ("targets_T", targets_T)):
        require(tensor.device == hidden_TH.device, name, tensor, f"the device of hidden_TH, {hidden_TH.device}")
    require(0 < temperature < float("inf"), "temperature", temperature, "a finite number > 0")
    require(chunk_tokens is None or chunk_tokens > 0, "chunk_tokens", chunk_tokens, "None or an integer > 0")
    V = weight_VH.shape[0]
    rows = V * (tp_group.size() if tp_group is not None else 1)
    require(vocab_size is None or 0 < vocab_size <= rows, "vocab_size", vocab_size, f"1..{rows}, the rows of the head")
    if chunk_tokens is None:
        logits = LOGITS_ON_CPU if hidden_TH.device.type == "cpu" else LOGITS_ON_GPU
        chunk_tokens = max(logits, MIN_SPAN * T) // max(V, 1)
    backward = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)
    return _linear_logprob(
        hidden_TH,
        weight_VH,
        targets_T,
        float(temperature),
        return_entropy,
        ignore_index,
        chunk_tokens,
        rows if vocab_size is None else vocab_size,
        tp_group.group_name if tp_group is not None else "",
        check_values,
        backward and T <= chunk_tokens,
    )[:3]


def grpo_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor | None,
    reference_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    token_weights_T: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    ratio: str = "token",
    ratio_max: float | None = None,
    rollout_logprobs_T: Tensor | None = None,
    importance_cap: float | None = None,
    check_values: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss (DeepSeekMath, arXiv 2402.03300): (scalar, metrics).

    loss = sum over t of token_weights_t x ( - min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) x w_t
                                             + kl_coefficient x KL_t ),   r = exp(logprobs - old_logprobs)

    - old_logprobs_T None: those of this very policy, so r = 1 (one step a rollout).
    - token_weights_T carry the aggregation (see aggregation_weights) and are 0 outside completions, so the loss of a
      step is the sum over its micro-batches however they are split. Where the weight is 0 nothing else is read.
    - kl_estimator of KL(policy || reference), with d = reference - policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
    - ratio = "sequence" takes the geometric mean of r over each sequence (GSPO, arXiv 2507.18071); needs cu_seqlens.
    - ratio_max bounds r where A < 0 (two-sided or dual clip, arXiv 1912.09729).
    - importance_cap: w = min(exp(old - rollout), cap), the truncated importance weight for a rollout engine whose
      log-probabilities differ; 1 without it. Needs rollout_logprobs_T.

    Only logprobs_T gets a gradient. Metrics are 0-d sums over the tokens with a weight, to be added over micro-batches
    and ranks: token_count, ratio_sum, clip_low_count, clip_high_count, clip_dual_count, kl_k1_sum, kl_k2_sum,
    kl_k3_sum, importance_weight_sum, importance_cap_count, mismatch_abs_sum, mismatch_k3_sum (old against rollout).

    Raises ValueError for wrong shapes or devices, advantages that are not finite, cu_seqlens that do not cover the
    tokens, and options out of range. check_values=False leaves out what needs a look into the tensors, for which the
    host waits for a GPU.
    """
    _check_grpo(
        logprobs_T.shape, logprobs_T.device, old_logprobs_T, reference_logprobs_T, advantages_T, token_weights_T,
        cu_seqlens, clip_low, clip_high, kl_coefficient, kl_estimator, ratio, ratio_max, rollout_logprobs_T,
        importance_cap,
    )  # fmt: skip
    require(
        logprobs_T.dim() == 1 and logprobs_T.is_floating_point(), "logprobs_T", logprobs_T, "a floating (T,) tensor"
    )
    loss, sums, _ = _grpo_loss(
        logprobs_T,
        (logprobs_T if old_logprobs_T is None else old_logprobs_T).detach(),
        None if reference_logprobs_T is None else reference_logprobs_T.detach(),
        advantages_T.detach(),
        token_weights_T.detach(),
        cu_seqlens if ratio == "sequence" else None,
        rollout_logprobs_T,
        float(clip_low),
        float(clip_high),
        ratio_max,
        importance_cap,
        float(kl_coefficient),
        kl_estimator,
        check_values,
    )
    return loss, dict(zip(reference.METRICS, sums.detach().unbind()))


def linear_grpo_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    old_logprobs_T: Tensor | None,
    reference_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    token_weights_T: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    check_values: bool = True,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """grpo_loss of linear_logprob: hidden states and head weight in, (loss, metrics) out, logits never in memory.

    The options are those of grpo_loss; the metrics are too, and entropy_sum over the tokens with a weight.
    Tokens with weight 0 cost nothing. The backward needs the scalar's gradient only, so nothing of the loss is kept but
    (T) vectors. Raises what the two raise.
    """
    _check_grpo(
        hidden_TH.shape[:1], hidden_TH.device, old_logprobs_T, reference_logprobs_T, advantages_T, token_weights_T,
        **options,
    )  # fmt: skip
    ignored = torch.iinfo(torch.int64).min
    require(
        targets_T.shape == hidden_TH.shape[:1] and targets_T.dtype == torch.int64,
        "targets_T", targets_T, f"an int64 ({hidden_TH.shape[0]},) tensor",
    )  # fmt: skip
    active_T = torch.where(token_weights_T != 0, targets_T, ignored)
    logprobs_T, entropy_T, _ = _run_linear_logprob(
        hidden_TH, weight_VH, active_T, temperature, True, ignored, chunk_tokens, tp_group, vocab_size, check_values
    )
    loss, metrics = grpo_loss(
        logprobs_T, old_logprobs_T, reference_logprobs_T, advantages_T, token_weights_T, check_values=check_values,
        **options,
    )  # fmt: skip
    metrics["entropy_sum"] = entropy_T.detach().sum()
    return loss, metrics


def _check_grpo(
    shape: torch.Size,
    device: torch.device,
    old_logprobs_T: Tensor | None,
    reference_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    token_weights_T: Tensor,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    ratio: str = "token",
    ratio_max: float | None = None,
    rollout_logprobs_T: Tensor | None = None,
    importance_cap: float | None = None,
) -> None:
    tensors = {
        "old_logprobs_T": old_logprobs_T,
        "reference_logprobs_T": reference_logprobs_T,
        "advantages_T": advantages_T,
        "token_weights_T": token_weights_T,
        "rollout_logprobs_T": rollout_logprobs_T,
    }
    for name, tensor in tensors.items():
        require(
            tensor is None or (tensor.shape == shape and tensor.device == device),
            name, tensor, f"a tensor of shape {tuple(shape)} on {device}",
        )  # fmt: skip
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("kl_coefficient", kl_coefficient)):
        require(value >= 0, name, value, "a number >= 0")
    for name, bound in (("ratio_max", ratio_max), ("importance_cap", importance_cap)):
        require(bound is None or bound > 0, name, bound, "None or a number > 0")
    require(kl_estimator in KL_ESTIMATORS, "kl_estimator", kl_estimator, f"one of {', '.join(KL_ESTIMATORS)}")
    require(ratio in RATIOS, "ratio", ratio, f"one of {', '.join(RATIOS)}")
    require(
        not kl_coefficient or reference_logprobs_T is not None,
        "reference_logprobs_T", None, f"a tensor, since kl_coefficient is {kl_coefficient}",
    )  # fmt: skip
    require(
        importance_cap is None or rollout_logprobs_T is not None,
        "rollout_logprobs_T", None, f"a tensor, since importance_cap is {importance_cap}",
    )  # fmt: skip
    require(
        ratio == "token"
        or (cu_seqlens is not None and cu_seqlens.dim() == 1 and len(cu_seqlens) >= 1
            and cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.device == device),
        "cu_seqlens", cu_seqlens, f"an int32 or int64 (S + 1,) tensor on {device}, since ratio is 'sequence'",
    )  # fmt: skip


def aggregation_weights(
    lengths_S: Tensor,
    aggregation: str = "sequence_mean",
    *,
    constant_length: int | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """The weight of one token of each sequence, (S) float32, from the sequences' completion lengths (integers).

    "sequence_mean": 1 / (sequences x own length), DeepSeekMath's mean over an output and then over outputs;
    "token_mean": 1 / (all tokens), DAPO (arXiv 2503.14476); "constant": 1 / (sequences x constant_length), Dr. GRPO
    (arXiv 2503.20783). A sequence of length 0 has weight 0. When lengths_S is a part of what one step sees,
    num_sequences and num_tokens give the counts of the whole.
    """
    require(
        lengths_S.dim() == 1 and not lengths_S.is_floating_point(), "lengths_S", lengths_S, "an integer (S,) tensor"
    )
    require(aggregation in AGGREGATIONS, "aggregation", aggregation, f"one of {', '.join(AGGREGATIONS)}")
    lengths = lengths_S.double()
    sequences = max(num_sequences if num_sequences is not None else len(lengths_S), 1)
    if aggregation == "sequence_mean":
        weights = 1.0 / (sequences * lengths.clamp(min=1))
    elif aggregation == "token_mean":
        tokens = lengths.sum() if num_tokens is None else lengths.new_tensor(num_tokens)
        weights = (1.0 / tokens.clamp(min=1)).expand_as(lengths)
    else:
        if constant_length is None or constant_length <= 0:
            raise ValueError(f"constant_length is {constant_length}, wanted an integer > 0 for aggregation 'constant'")
        weights = torch.full_like(lengths, 1.0 / (sequences * constant_length))
    return torch.where(lengths > 0, weights, 0.0).float()


def group_advantages(
    rewards: Tensor, group_ids: Tensor | None = None, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """(reward - mean of its group) / (std of its group + eps), in the shape and type of `rewards`.

    rewards is (prompts, G) with one group a row, or (S) with group_ids (S) int64 >= 0. std is the population's, as the
    R1 paper writes; a group of equal rewards gets exactly 0. normalize_std=False leaves the division out (Dr. GRPO).
    """
    require(rewards.is_floating_point(), "rewards", rewards, "a floating tensor")
    if group_ids is None:
        require(rewards.dim() == 2, "rewards", rewards, "a (prompts, G) tensor, or a (S,) tensor with group_ids")
        r = rewards.double()
        mean, low, high = r.mean(-1, keepdim=True), r.amin(-1, keepdim=True), r.amax(-1, keepdim=True)
        std = (r - mean).square().mean(-1, keepdim=True).sqrt()
    else:
        require(
            rewards.dim() == 1 and group_ids.shape == rewards.shape and group_ids.dtype == torch.int64,
            "group_ids", group_ids, "an int64 (S,) tensor beside rewards (S,)",
        )  # fmt: skip
        r = rewards.double()
        groups = int(group_ids.max()) + 1 if len(r) else 0
        empty = r.new_zeros(groups)
        gather = lambda x, how: empty.scatter_reduce(0, group_ids, x, how, include_self=False)[group_ids]
        mean, low, high = gather(r, "mean"), gather(r, "amin"), gather(r, "amax")
        std = gather((r - mean).square(), "mean").sqrt()
    centred = torch.where(low == high, 0.0, r - mean)
    return (centred / (std + eps) if normalize_std else centred).to(rewards.dtype)


__all__ = [
    "aggregation_weights",
    "group_advantages",
    "grpo_loss",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_logprob",
]
