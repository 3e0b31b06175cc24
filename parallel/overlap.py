"""Megatron's combined 1F1B schedule over our layers: a micro-batch's forward runs beside another's backward, layer by
layer, so that the products of one hide the exchange of the other's tokens among experts.

Megatron cuts a layer into attention, dispatch, experts and combine, each its own piece of the autograd graph, and runs
the two exchanges on a stream of their own. What it does not know is our multi-token prediction, which takes its shifted
tokens from the pack, and that padding must not count towards the experts' load.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.models.gpt import fine_grained_callables
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock, MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from r1.parallel.packing import PackedSequence


class DecoderLayer(TransformerLayer):
    """Megatron's layer; in the combined schedule its experts' router is told of the padding here."""

    def _forward_attention(self, *args: Any, **options: Any) -> Any:
        if self.config.overlap_moe_expert_parallel_comm and self.is_moe_layer:
            self.mlp.padding_TB = _local_padding(options.get("packed_seq_params"), self.config)
        return super()._forward_attention(*args, **options)


def _local_padding(packed: Any, config: Any) -> Tensor | None:
    mask_BT = packed.padding_mask_BT if isinstance(packed, PackedSequence) else None
    if mask_BT is None:
        return None
    if config.sequence_parallel:
        group = parallel_state.get_tensor_model_parallel_group()
        mask_BT = mask_BT.chunk(group.size(), 1)[group.rank()]
    return mask_BT.transpose(0, 1).bool()


class SchedulePlan(TransformerModelChunkSchedulePlan):
    """One micro-batch's way through a model chunk, in Megatron's pieces."""

    def _build_layer_schedule_plan(self, module: Any, comp_stream: Any, comm_stream: Any) -> None:
        if isinstance(module, MultiTokenPredictionBlock) and not self.state.packed_seq_params.next_tokens:
            return  # the loss does not use it
        super()._build_layer_schedule_plan(module, comp_stream, comm_stream)


def install() -> None:
    """Put our pieces of the MTP layer in the place of Megatron's, and keep hidden states in their type: safe to call
    more than once."""
    fine_grained_callables.build_layer_callables = _callables
    fine_grained_callables.float16_to_fp32 = lambda x: x


def _callables(layer: Any) -> tuple[list[Any], dict[str, Any]]:
    if not isinstance(layer, MultiTokenPredictionLayer):
        return fine_grained_callables.build_transformer_layer_callables(layer)
    pieces, delayed = fine_grained_callables.build_transformer_layer_callables(layer.transformer_layer)
    attention, *rest, _ = pieces

    def begin(node: Any, hidden: Tensor) -> Any:
        state = node.chunk_state
        if node.is_first_layer:
            state.mtp_hidden_states = [hidden]
        _, _, ahead, hidden = layer._get_embeddings(
            state.input_ids, None, state.model.embedding, hidden, state.packed_seq_params
        )
        return attention(node, layer._concat_embeddings(hidden, ahead))

    def finish(node: Any, hidden: Tensor) -> Tensor:
        depths = node.chunk_state.mtp_hidden_states
        depths.append(layer._postprocess(hidden))
        return torch.cat(depths) if node.is_last_layer else depths[-1]

    return [begin, *rest, finish], {**delayed, "attn": [delayed["attn"], layer.eh_proj]}
