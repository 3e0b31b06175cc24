"""What the last pipeline stage does with hidden states: losses of SFT, GRPO and reward models, log-probabilities.

Every loss is a sum over tokens of `weight × something`, where the weights already carry the normalisation of the whole
optimiser step. So it does not matter how tokens are split into micro-batches, replicas or context-parallel ranks.

A loss is a function (model, hidden states of all depths, micro-batch, pack) → (scalar, {name: 0-d tensor}); the metrics
are sums too. Names ending in `_max` are maxima.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from r1.kernels import grpo_loss, linear_cross_entropy, linear_grpo_loss, linear_logprob
from r1.parallel.model import DecoderModel
from r1.parallel.packing import MicroBatch, PackedSequence

IGNORED = -100  # a target that is not computed

Metrics = dict[str, Tensor]
Loss = Callable[[DecoderModel, list[Tensor], MicroBatch, PackedSequence], tuple[Tensor, Metrics]]


def _tp(model: DecoderModel) -> torch.distributed.ProcessGroup | None:
    group = model.pg_collection.tp
    return group if group.size() > 1 else None


def _whole_stream(x_T: Tensor, model: DecoderModel, packed: PackedSequence) -> Tensor:
    """Every token's row, in stream order, on every context-parallel rank; each keeps its own tokens' gradients."""
    if packed.gather_order_T is None:
        return x_T
    group = model.pg_collection.cp
    whole = gather_from_sequence_parallel_region(x_T.contiguous(), tensor_parallel_output_grad=False, group=group)
    return whole[packed.gather_order_T]


def _shift(x_T: Tensor, depth: int, cu_seqlens: Tensor) -> Tensor:
    """x at the token `depth` further on in the same sequence, 0 where the sequence has ended."""
    T = x_T.numel()
    stream = torch.arange(T, device=x_T.device)
    ends = torch.repeat_interleave(cu_seqlens[1:].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long(), output_size=T)
    return torch.where(stream + depth < ends, x_T[(stream + depth).clamp(max=T - 1)], 0)


@dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy on `targets`, weighted by `weights`; the MTP layers' losses are added with V3's weight (V3 §2.2).

    Fields of the micro-batch: targets (T) int64, weights (T) float32.
    """

    vocab_size: int
    uses_mtp: ClassVar[bool] = True

    def __call__(
        self, model: DecoderModel, hidden: list[Tensor], batch: MicroBatch, packed: PackedSequence
    ) -> tuple[Tensor, Metrics]:
        total, metrics = torch.zeros((), device=batch.tokens_T.device), {}
        for depth, hidden_TH in enumerate(hidden):
            targets_T = packed.local(_shift(batch.fields["targets"], depth, batch.cu_seqlens))
            weights_T = packed.local(_shift(batch.fields["weights"], depth, batch.cu_seqlens))
            targets_T = targets_T.masked_fill(weights_T == 0, IGNORED)
            loss_T = model.head(
                hidden_TH,
                lambda h, w, t=targets_T: linear_cross_entropy(
                    h, w, t, tp_group=_tp(model), vocab_size=self.vocab_size
                ),
            )
            loss = (loss_T * weights_T).sum()
            metrics["loss" if depth == 0 else f"mtp_loss_{depth}"] = loss.detach()
            scale = 1.0 if depth == 0 else model.config.model.mtp_loss_weight / (len(hidden) - 1)
            total = total + scale * loss
        return total, metrics


@dataclass(frozen=True)
class PolicyLoss:
    """GRPO (arXiv 2402.03300) with the options of r1.kernels.grpo_loss.

    Fields (T): targets, weights (the aggregation; 0 outside completions), advantages, old_logprobs,
    and where used reference_logprobs and rollout_logprobs.
    """

    vocab_size: int
    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    ratio: str = "token"
    ratio_max: float | None = None
    importance_cap: float | None = None

    def __call__(
        self, model: DecoderModel, hidden: list[Tensor], batch: MicroBatch, packed: PackedSequence
    ) -> tuple[Tensor, Metrics]:
        options = {
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "kl_coefficient": self.kl_coefficient,
            "kl_estimator": self.kl_estimator,
            "ratio": self.ratio,
            "ratio_max": self.ratio_max,
            "importance_cap": self.importance_cap,
        }
        sequence_ratio_over_context = self.ratio == "sequence" and packed.gather_order_T is not None
        field = batch.fields if sequence_ratio_over_context else {n: packed.local(x) for n, x in batch.fields.items()}
        rest = {
            "rollout_logprobs_T": field.get("rollout_logprobs"),
            "cu_seqlens": batch.cu_seqlens if self.ratio == "sequence" else None,
        }
        fixed = (field["old_logprobs"], field.get("reference_logprobs"), field["advantages"], field["weights"])
        if not sequence_ratio_over_context:
            loss, metrics = model.head(
                hidden[0],
                lambda h, w: linear_grpo_loss(
                    h,
                    w,
                    field["targets"],
                    *fixed,
                    temperature=self.temperature,
                    tp_group=_tp(model),
                    vocab_size=self.vocab_size,
                    **options,
                    **rest,
                ),
            )
        else:
            # The ratio of a sequence needs all its tokens: gather the log-probabilities, compute the whole loss on
            # every rank, and let each rank keep its own tokens' gradients and its share of the sums.
            targets_T = field["targets"].masked_fill(field["weights"] == 0, IGNORED)
            own_T, entropy_T = self._logprobs(model, hidden[0], packed.local(targets_T))
            loss, metrics = grpo_loss(_whole_stream(own_T, model, packed), *fixed, **options, **rest)
            ways = model.pg_collection.cp.size()
            metrics = {name: value if name.endswith("_max") else value / ways for name, value in metrics.items()}
            metrics["loss"] = loss.detach() / ways
            metrics["entropy_sum"] = entropy_T.sum()
            return loss, metrics
        metrics["loss"] = loss.detach()
        return loss, metrics

    def _logprobs(self, model: DecoderModel, hidden_TH: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        return model.head(
            hidden_TH,
            lambda h, w: linear_logprob(
                h,
                w,
                targets_T,
                self.temperature,
                return_entropy=True,
                tp_group=_tp(model),
                vocab_size=self.vocab_size,
            ),
        )


@dataclass(frozen=True)
class PreferenceLoss:
    """Reward models: pairwise −log σ(chosen − rejected) (Bradley–Terry) or pointwise binary cross-entropy.

    Sequence fields (S): partner int64 (index of the rejected sequence in this micro-batch, −1 where the sequence is
    not a chosen one), label float (1 or 0; −1 where the sequence belongs to a pair), sequence_weights float32.
    """

    def __call__(
        self, model: DecoderModel, hidden: list[Tensor], batch: MicroBatch, packed: PackedSequence
    ) -> tuple[Tensor, Metrics]:
        scores_S = sequence_values(model, hidden, batch, packed)
        partner, label = batch.sequence_fields["partner"], batch.sequence_fields["label"]
        weight = batch.sequence_fields["sequence_weights"]
        margin = scores_S - scores_S[partner.clamp(min=0)]
        pair_loss = -torch.nn.functional.logsigmoid(margin)
        point_loss = torch.nn.functional.binary_cross_entropy_with_logits(
            scores_S, label.clamp(min=0), reduction="none"
        )
        is_pair, is_point = partner >= 0, label >= 0
        loss = (weight * (pair_loss * is_pair + point_loss * is_point)).sum()
        right = torch.where(is_pair, margin > 0, (scores_S > 0) == (label > 0.5)) & (is_pair | is_point)
        # Under context parallelism every rank computes the whole loss and keeps its own tokens' gradients.
        ways = model.pg_collection.cp.size()
        metrics = {
            "loss": loss.detach() / ways,
            "accuracy_sum": right.sum() / ways,
            "example_count": (is_pair | is_point).sum() / ways,
        }
        return loss, metrics


def sequence_values(model: DecoderModel, hidden: list[Tensor], batch: MicroBatch, packed: PackedSequence) -> Tensor:
    """The value head at the last token of each real sequence, (S) float32."""
    values_T = _whole_stream(model.value(hidden[0]), model, packed)
    count = batch.sequence_fields["real"].numel()
    return values_T[batch.cu_seqlens[1 : count + 1].long() - 1]


@dataclass(frozen=True)
class TokenLogprobs:
    """log p(target) and the entropy of every token of the stream, without gradients: (T, 2) float32. Both are 0 where
    the target is IGNORED."""

    vocab_size: int
    temperature: float = 1.0

    def __call__(self, model: DecoderModel, hidden: list[Tensor], batch: MicroBatch, packed: PackedSequence) -> Tensor:
        targets_T = packed.local(batch.fields["targets"])
        logprobs, entropy = model.head(
            hidden[0],
            lambda h, w: linear_logprob(
                h,
                w,
                targets_T,
                self.temperature,
                return_entropy=True,
                tp_group=_tp(model),
                vocab_size=self.vocab_size,
            ),
        )
        return _whole_stream(torch.stack([logprobs, entropy], -1), model, packed)
