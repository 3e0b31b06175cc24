"""Mixture of experts: our router and experts behind Megatron's layer and its token dispatchers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from r1.kernels import fp8_moe_mlp, moe_layer, moe_mlp, permute, quantize_weight, route, unpermute
from r1.parallel.fp8 import KeepsQuantized, activated
from r1.parallel.linear import exact_linear, main_gradients, mark_as_added


class DenseMLP(MLP):
    """Megatron's gated MLP with our SwiGLU between its two linears."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any) -> tuple:
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(activated(gate_up, self.linear_fc2))[0], None


class SharedExperts(SharedExpertMLP):
    """The experts that every token visits, as one gated MLP."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.config.moe_shared_expert_overlap:
            return super().forward(hidden_states)
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(activated(gate_up, self.linear_fc2))[0]


class _WideLinear(torch.autograd.Function):
    """x Wᵀ in float32, of operands that are kept as they came: autograd would keep a float32 copy of the hidden states,
    a tenth of all that a layer keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(x.dtype), (grad.t() @ x.float()).to(weight.dtype)


class Router(TopKRouter):
    """DeepSeek-V3's sigmoid router (V3 §2.1.2): groups, a bias that only chooses, normalised weights."""

    def choose(self, hidden: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden (..., H) → expert ids (T, K), weights (T, K); counts the load of tokens that are not padding."""
        self._maintain_float32_expert_bias()
        config = self.config
        hidden_TH = hidden.flatten(0, -2)
        if config.parallel.numerics == "exact":
            logits_TE = exact_linear(hidden_TH.float(), self.weight.float())
        else:
            logits_TE = _WideLinear.apply(hidden_TH, self.weight)
        ids, weights, load = route(
            logits_TE,
            self.expert_bias,
            config.moe_router_topk,
            config.moe_router_num_groups or 1,
            config.moe_router_group_topk or 1,
            config.moe_router_topk_scaling_factor,
            padding_mask_T=None if padding_mask is None else padding_mask.reshape(-1),
        )
        if torch.is_grad_enabled():
            self.local_tokens_per_expert += load
        return ids, weights

    def forward(self, input: Tensor, padding_mask: Tensor | None = None, as_ids: bool = False) -> tuple[Tensor, Tensor]:
        """Megatron's form of the choice: weights (T, E) and the map (T, E) of who goes where; or ids and weights."""
        ids, weights = self.choose(input, padding_mask)
        if as_ids:
            return ids, weights
        shape = (ids.shape[0], self.config.num_moe_experts)
        probabilities = torch.zeros(shape, dtype=weights.dtype, device=weights.device).scatter(1, ids, weights)
        chosen = torch.zeros(shape, dtype=torch.bool, device=weights.device).scatter(1, ids, True)
        return probabilities, chosen


class Experts(MegatronModule):
    """This rank's routed experts, in two tensors: gate_up (E, H, 2, F) and down (E, F, H), F split by expert-TP."""

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        width = config.moe_ffn_hidden_size // self.groups.expt_tp.size()
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def parameter(*shape: int, split: int) -> torch.nn.Parameter:
            p = torch.nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=device))
            if config.perform_initialization:
                config.init_method(p)
            # Expert gradients are summed over the expert-data group, whatever the expert-parallel size is.
            p.allreduce = False
            # Not a copy of another tensor-parallel rank's: else the gradient norm would leave it out there.
            set_tensor_model_parallel_attributes(p, True, split, 1)
            return p

        self.gate_up = parameter(num_local_experts, config.hidden_size, 2, width, split=3)
        self.down = parameter(num_local_experts, width, config.hidden_size, split=1)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows (P, H) sorted by expert, tokens_per_expert (E), weights (P) → (P, H), no bias. Or tokens (T, H), ids
        (T, K), weights (T, K) → (T, H)."""
        x, main = permuted_local_hidden_states, self.main_gradients()
        if permuted_probs.dim() == 2:
            out = self._layer(x, tokens_per_expert, permuted_probs, main)
        else:
            out = self._mlp(x, tokens_per_expert.to(x.device), permuted_probs, main)
        if main:
            mark_as_added(out, self.gate_up, self.down)
        return out, None

    def _layer(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, main: Any) -> Tensor:
        return moe_layer(x_TH, ids_TK, weights_TK, self.gate_up.flatten(2), self.down, main_gradients=main)

    def _mlp(self, x_PH: Tensor, tokens_per_expert_E: Tensor, weights_P: Tensor, main: Any) -> Tensor:
        return moe_mlp(x_PH, tokens_per_expert_E, self.gate_up.flatten(2), self.down, weights_P, main)

    def main_gradients(self) -> tuple[Tensor, Tensor] | None:
        main = main_gradients(self.gate_up, self.down)
        return (main[0].flatten(2), main[1]) if main else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        experts = (self.groups.ep.rank(), self.groups.ep.size())
        width = (self.groups.expt_tp.rank(), self.groups.expt_tp.size())
        ahead = len(sharded_offsets)
        shards = {}
        for name, parameter, width_axis in (("gate_up", self.gate_up, 3), ("down", self.down, 1)):
            shards[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                (ahead, *experts),
                (ahead + width_axis, *width),
                replica_id=(0, 0, self.groups.expt_dp.rank()),
                prepend_axis_num=ahead,
            )
        return shards

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; ours are made with the rest."""


class BlockExperts(KeepsQuantized, Experts):
    """The routed experts with their products in FP8."""

    def quantize(self) -> tuple:
        return quantize_weight(self.gate_up.flatten(2)), quantize_weight(self.down)

    def _layer(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, main: Any) -> Tensor:
        x_PH, row_map_P, tokens_per_expert_E = permute(x_TH, ids_TK, len(self.down))
        weights_P = weights_TK.flatten()[row_map_P]
        out_PH = self._mlp(x_PH, tokens_per_expert_E, weights_P, main)
        return unpermute(out_PH, row_map_P, *ids_TK.shape)

    def _mlp(self, x_PH: Tensor, tokens_per_expert_E: Tensor, weights_P: Tensor, main: Any) -> Tensor:
        weights = self.gate_up.flatten(2), self.down
        return fp8_moe_mlp(x_PH, tokens_per_expert_E, *weights, weights_P, self.quantized(), main)


class MixtureOfExperts(MoELayer):
    """Megatron's layer; where all experts are on this rank, tokens are sorted in place and no dispatcher is asked."""

    padding_TB: Tensor | None = None  # of the micro-batch that is on its way, in the combined schedule

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().route(hidden_states, self.padding_TB if padding_mask is None else padding_mask)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        self.padding_TB = None
        local = self.ep_group.size() == 1 and self.token_dispatcher.tp_size == 1
        if not local or intermediate_tensors is not None or self.shared_expert_overlap or self.moe_layer_recompute:
            result = super().forward(hidden_states, intermediate_tensors, padding_mask)
            for name in ("probs", "routing_map", "local_probs", "local_map"):
                # The dispatcher would hold on to the choice, and by its graph to what this layer's backward made,
                # until the layer's next forward.
                if hasattr(self.token_dispatcher, name):
                    setattr(self.token_dispatcher, name, None)
            return result
        mask = padding_mask.transpose(0, 1).bool() if padding_mask is not None else None
        # Called as modules: Megatron waits for gathered parameters in hooks before a module's forward.
        ids_TK, weights_TK = self.router(hidden_states, mask, as_ids=True)
        out = self.experts(hidden_states.flatten(0, 1), ids_TK, weights_TK)[0].view_as(hidden_states)
        if self.use_shared_expert:
            out = out + self.shared_experts(hidden_states)
        return out, None
