"""DeepSeek-V3 and dense GQA decoders as Megatron GPTModels: our modules in Megatron's places."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from r1.kernels import rope_tables
from r1.kernels.backend import backend
from r1.parallel import overlap
from r1.parallel.attention import CachedStep, GroupedQueryAttention, MultiHeadLatentAttention, RMSNorm, norm_of_linears
from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.fp8 import linears
from r1.parallel.moe import BlockExperts, DenseMLP, Experts, MixtureOfExperts, Router, SharedExperts
from r1.parallel.overlap import DecoderLayer, SchedulePlan
from r1.parallel.packing import PackedSequence
from r1.parallel.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}  # of a pipeline layout
# Triton's own interpreter multiplies with numpy, whose sums follow the matrix's shape.
EXACT_BACKENDS = {"cpu": ("torch", "cpu"), "cuda": ("triton",)}


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron's configuration, and ours beside it for our own modules."""

    model: ModelConfig = field(default=None, kw_only=True)  # type: ignore[assignment]
    parallel: ParallelConfig = field(default=None, kw_only=True)  # type: ignore[assignment]


def decoder_config(model: ModelConfig, parallel: ParallelConfig) -> DecoderConfig:
    """Megatron's configuration of this model in this layout."""
    dtype = DTYPES[parallel.dtype]
    options: dict[str, Any] = {}
    if model.is_moe:
        options.update(
            num_moe_experts=model.num_experts,
            moe_layer_freq=[0] * model.num_dense_layers + [1] * (model.num_layers - model.num_dense_layers),
            moe_ffn_hidden_size=model.expert_hidden_size,
            moe_shared_expert_intermediate_size=model.num_shared_experts * model.expert_hidden_size or None,
            moe_router_topk=model.experts_per_token,
            moe_router_num_groups=model.num_expert_groups if model.num_expert_groups > 1 else None,
            moe_router_group_topk=model.groups_per_token if model.num_expert_groups > 1 else None,
            moe_router_topk_scaling_factor=model.routed_scaling_factor,
            moe_router_score_function="sigmoid",
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=model.expert_bias_update_speed,
            moe_token_dispatcher_type=parallel.dispatcher,
            moe_shared_expert_overlap=parallel.overlap_shared_experts,
        )
    if model.num_mtp_layers:
        options.update(mtp_num_layers=model.num_mtp_layers, mtp_loss_scaling_factor=model.mtp_loss_weight)
    if parallel.recompute == "selective":
        options.update(recompute_granularity="selective", recompute_modules=["layernorm", "mlp"])
    elif parallel.recompute == "full":
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if parallel.virtual_pipeline > 1:
        # Batched point-to-point calls give garbage here with two pipeline ranks, and nothing checks it.
        options.update(
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )
    if parallel.fp8 == "transformer_engine":
        options.update(fp8="e4m3", fp8_recipe="blockwise")
    if parallel.pipeline_layout or model.num_layers % (parallel.pipeline * parallel.virtual_pipeline):
        layout = [[LAYERS[letter] for letter in stage] for stage in parallel.stages(model)]
        options.update(pipeline_model_parallel_layout=layout)
    initialise = functools.partial(torch.nn.init.normal_, mean=0.0, std=model.init_std)
    config = DecoderConfig(
        model=model,
        parallel=parallel,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.qk_head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        init_method=initialise,
        output_layer_init_method=initialise,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1 and parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # The losses arrive weighted for the whole step, so gradients are summed, never averaged.
        calculate_per_token_loss=True,
        **options,
    )
    # Set afterwards: Megatron's checks want bf16 for it, which nothing in it needs.
    config.overlap_moe_expert_parallel_comm = parallel.overlap_expert_exchange and model.is_moe
    return config


def layer_spec(config: DecoderConfig, moe: bool) -> ModuleSpec:
    """One decoder layer, with our attention, norms and experts in Megatron's places."""
    model, fp8 = config.model, config.parallel.fp8
    attention = MultiHeadLatentAttention if model.architecture == "deepseek_v3" else GroupedQueryAttention
    classes = linears(config.parallel)
    projections = MLPSubmodules(linear_fc1=classes.column, linear_fc2=classes.row)
    if moe:
        experts = ModuleSpec(module=Experts if fp8 == "off" else BlockExperts)
        shared = ModuleSpec(module=SharedExperts, submodules=projections)
        mlp = ModuleSpec(
            module=MixtureOfExperts,
            submodules=MoESubmodules(experts=experts, shared_experts=shared, router=Router),
        )
    else:
        mlp = ModuleSpec(module=DenseMLP, submodules=projections, params={"ffn_hidden_size": model.ffn_hidden_size})
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_of_linears(config),
            self_attention=ModuleSpec(module=attention, params={"attn_mask_type": AttnMaskType.causal}),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm if moe else norm_of_linears(config),  # a router reads it too
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class MultiTokenPrediction(MultiTokenPredictionLayer):
    """Megatron's MTP layer, given the shifted tokens of the pack instead of rolling its own."""

    def _get_embeddings(
        self, input_ids: Tensor, position_ids: Any, embedding: Any, hidden_states: Tensor, packed_seq_params: Any = None
    ) -> tuple:
        ahead_BT = packed_seq_params.next_tokens[self.layer_number - 1][None]
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        return input_ids, position_ids, embedding(input_ids=ahead_BT, position_ids=position_ids), hidden_states

    def _proj_and_transformer_layer(
        self, hidden_states: Tensor, decoder_input: Tensor, packed_seq_params: Any = None, **unused: Any
    ) -> Tensor:
        """Megatron's, but its layer is told of the padding, which must not count towards the experts' load."""
        mask_BT = packed_seq_params.padding_mask_BT
        if mask_BT is not None and self.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            mask_BT = mask_BT.chunk(group.size(), 1)[group.rank()]
        hidden, _ = self.transformer_layer(
            hidden_states=self._concat_embeddings(hidden_states, decoder_input),
            attention_mask=None,
            packed_seq_params=packed_seq_params,
            padding_mask=mask_BT,
        )
        return self._postprocess(hidden)

    def _checkpointed_forward(self, forward_func: Any, **rest: Any) -> Tensor:
        """Megatron's hands everything to autograd, which keeps tensors only; the pack goes around it."""
        hidden, ahead = rest.pop("hidden_states"), rest.pop("decoder_input")
        return checkpoint(functools.partial(forward_func, **rest), False, hidden, ahead)


class Head(ColumnParallelLinear):
    """The output layer: hands its weight to a kernel that never makes the logits."""

    def forward(self, hidden: Tensor, function: Any, weight: Tensor | None = None) -> Any:  # type: ignore[override]
        return function(hidden, self.weight if weight is None else weight)


class DecoderModel(GPTModel):
    """A GPTModel that ends at the hidden states; the losses call `head` (language model) or `value` (reward model)."""

    def __init__(self, *args: Any, value_head: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            if value_head:
                self.output_layer = None
                weight = torch.empty(1, self.config.hidden_size, dtype=self.config.params_dtype)
                self.value_weight = torch.nn.Parameter(weight.to(self._parameter_device()))
            elif not self.share_embeddings_and_output_weights or not self.pre_process:
                self.output_layer.__class__ = Head

    def _parameter_device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, tokens_T: Tensor, packed: PackedSequence | CachedStep) -> Tensor:  # type: ignore[override]
        """tokens_T local to this context-parallel rank → hidden states; (1 + MTP layers) of them at the last stage,
        one after another, each (T, 1, H), sequence-parallel where the layout is."""
        padding_mask = getattr(packed, "padding_mask_BT", None)
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            padding_mask = padding_mask.chunk(self.pg_collection.tp.size(), 1)[self.pg_collection.tp.rank()]
        return super().forward(
            input_ids=tokens_T[None],
            position_ids=None,
            attention_mask=None,
            packed_seq_params=packed,
            padding_mask=padding_mask,
        )

    def schedule_plan(self, tokens_T: Tensor, packed: PackedSequence) -> SchedulePlan:
        """What `forward` does, in the pieces of Megatron's combined schedule."""
        return SchedulePlan(self, tokens_T[None], None, None, packed_seq_params=packed)

    def _postprocess(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        packed_seq_params: Any,
        mtp_in_postprocess: bool = True,
        **unused: Any,
    ) -> Tensor:
        if not mtp_in_postprocess:  # in the combined schedule it has run by then
            return hidden_states
        if self.mtp_process and isinstance(packed_seq_params, PackedSequence) and packed_seq_params.next_tokens:
            return self.mtp(
                input_ids=input_ids,
                position_ids=None,
                hidden_states=hidden_states,
                attention_mask=None,
                packed_seq_params=packed_seq_params,
                embedding=self.embedding,
            )
        return hidden_states

    def draft(self, hidden: Tensor, next_tokens_T: Tensor, step: CachedStep) -> Tensor:
        """The first multi-token-prediction layer over its cache: hidden states (T, 1, H) as `forward` returned them,
        and the tokens that follow, to those from which the head makes the token after the next."""
        layer = self.mtp.layers[0]
        ahead = self.embedding(input_ids=next_tokens_T[None], position_ids=None)
        return layer._proj_and_transformer_layer(hidden, ahead, step)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, except that its language model cannot be without an output layer, as a reward model is."""
        if self.post_process and self.output_layer is None:
            return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def hidden_of_all_tokens(self, hidden: Tensor) -> Tensor:
        """(T / tp, 1, H) → (T, H), whole on every tensor-parallel rank; the ranks then compute the same loss."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden.squeeze(1)

    def head(self, hidden_TH: Tensor, function: Any) -> Any:
        """`function(hidden_TH, weight_VH)` with this rank's rows of the output layer."""
        if self.share_embeddings_and_output_weights:
            return function(hidden_TH, self.shared_embedding_or_output_weight())
        return self.output_layer(hidden_TH, function)

    def value(self, hidden_TH: Tensor) -> Tensor:
        """The reward model's scalar for every token, (T) float32."""
        return torch.nn.functional.linear(hidden_TH.float(), self.value_weight.float()).squeeze(-1)


def build(
    model: ModelConfig, parallel: ParallelConfig, world: World, seed: int | None, value_head: bool = False
) -> list[DecoderModel]:
    """This rank's chunks of the model (one, or `virtual_pipeline` of them) with weights that depend on `seed` alone,
    not on the layout; None leaves them as memory was, for a checkpoint to fill. A reward model (`value_head`) has a
    scalar head, nothing tied to the embedding, and no MTP."""
    if value_head:
        model = model.model_copy(update={"num_mtp_layers": 0, "tie_embeddings": False})
    parallel.check_model(model)
    if parallel.numerics == "exact":
        wanted = EXACT_BACKENDS[world.device.type]
        for family in ("norm", "moe", "mla", "grpo"):
            if (found := backend(family, world.device)) not in wanted:
                raise ValueError(
                    f"the {family} family's backend is {found!r}, wanted R1_KERNELS={wanted[0]} with"
                    f" parallel.numerics = exact on {world.device}"
                )
    config = decoder_config(model, parallel)
    if parallel.overlap_expert_exchange:
        overlap.install()
    chunks = []
    for index in range(parallel.virtual_pipeline):
        stage = index if parallel.virtual_pipeline > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        offset = get_transformer_layer_offset(config, vp_stage=stage)
        count = get_num_layers_to_build(config, vp_stage=stage)
        is_moe = [model.is_moe and i >= model.num_dense_layers for i in range(model.num_layers)]
        layers = [layer_spec(config, is_moe[i]) for i in range(offset, offset + count)]
        chunk = DecoderModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",
            mtp_block_spec=_mtp_spec(config) if model.num_mtp_layers and last else None,
            pg_collection=world.groups,
            vp_stage=stage,
            value_head=value_head,
        )
        _mark_split_weights(chunk)
        chunks.append(chunk if chunk._parameter_device() == world.device else chunk.to(world.device))
    if seed is not None:
        initialise(chunks, model.init_std, seed, world)
    return chunks


def _mark_split_weights(chunk: DecoderModel) -> None:
    """Say which weights are split over tensor-parallel ranks: Megatron does so only when it draws them itself, and
    leaves unmarked ones out of the gradient norm on all ranks but the first."""
    for module in chunk.modules():
        axis = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            split = [module.weight] if axis else [module.weight, getattr(module, "bias", None)]
            for parameter in split:
                if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, axis, 1)


def _mtp_spec(config: DecoderConfig) -> ModuleSpec:
    model = config.model
    layer = ModuleSpec(
        module=MultiTokenPrediction,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=RMSNorm,
            hnorm=RMSNorm,
            # Never in FP8: the published weights have no scales for it.
            eh_proj=ColumnParallelLinear,
            transformer_layer=layer_spec(config, model.is_moe),
            layer_norm=RMSNorm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * model.num_mtp_layers),
    )


def checkpoint_metadata(world: World) -> dict[str, Any]:
    """How Megatron is to name and split tensors: each layer by its number, the optimiser free to change layout."""
    return {
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": world.groups.dp_cp,
    }


def sharded_state(chunks: list[DecoderModel], world: World) -> dict[str, Any]:
    """Megatron's description of every tensor: its name in the whole model, and which slice of it is here."""
    metadata = checkpoint_metadata(world)
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=metadata)}
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


@torch.no_grad()
def initialise(chunks: list[DecoderModel], std: float, seed: int, world: World) -> None:
    """Draw every weight from a generator seeded by its name, so that all layouts start from the same model."""
    for state in sharded_state(chunks, world).values():
        apply_factories(state)
        for tensor in nested_values(state):
            if not isinstance(tensor, ShardedTensor) or tensor.data is None:
                continue
            data = tensor.data
            if tensor.key.endswith(("norm.weight", "layernorm.weight")):
                data.fill_(1.0)
            elif tensor.key.endswith(("bias", "expert_bias")):
                data.zero_()
            else:
                digest = hashlib.sha256(f"{seed}:{tensor.key}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                whole = torch.empty(tensor.global_shape).normal_(0.0, std, generator=generator)
                for axis, (start, size) in enumerate(zip(tensor.global_offset, data_shape(tensor), strict=True)):
                    whole = whole.narrow(axis, start, size)
                data.copy_(whole.reshape(data.shape))


def data_shape(tensor: ShardedTensor) -> tuple[int, ...]:
    """The local slice's shape with the axes that only the whole tensor has."""
    return (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)


def rope_for(model: ModelConfig) -> Any:
    """positions_T → (cos, sin) for this model's rotary width, with what extends its context."""
    width = model.qk_rope_head_dim if model.architecture == "deepseek_v3" else model.qk_head_dim
    extension = {}
    if model.yarn:
        extension["yarn"] = model.yarn.model_dump()
    if model.llama3_rope:
        extension["llama3"] = model.llama3_rope.model_dump()

    def tables(positions_T: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables(positions_T, width, model.rope_base, **extension)

    return tables


def stream_multiple(parallel: ParallelConfig) -> int:
    """A micro-batch's token count must divide by this: the context split, then what each part must divide by."""
    context = 2 * parallel.context if parallel.context > 1 else 1
    return context * parallel.token_multiple
