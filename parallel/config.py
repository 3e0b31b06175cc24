"""What a model is and how it is laid out over processes: the two configurations the parallel layer needs."""

from __future__ import annotations

import importlib.util
import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Architecture = Literal["deepseek_v3", "llama", "qwen2"]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def check_moments(moments: str, betas: tuple[float, float]) -> None:
    """ValueError where moments in bfloat16 would stand still: one that shrinks by less than half a last place of its
    eight bits is rounded back to what it was."""
    most = 1 - 2**-8
    if moments == "bfloat16" and max(betas) > most:
        raise ValueError(
            f"moments = bfloat16 with betas {list(betas)} would never shrink, wanted both at most {most:.4g},"
            " or moments = float32"
        )


class YarnConfig(Section):
    """YaRN context extension (arXiv 2309.00071), as DeepSeek-V3 uses it."""

    factor: float = Field(40.0, ge=1.0)
    original_max_positions: int = Field(4096, ge=1)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    @property
    def changes_nothing(self) -> bool:
        """Whether this is how a preset leaves out what the one that it extends has."""
        return self.factor == 1


class Llama3RopeConfig(Section):
    """Context extension of Llama 3.1 (arXiv 2407.21783)."""

    factor: float = Field(8.0, ge=1.0)
    original_max_positions: int = Field(8192, ge=1)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor = {self.low_freq_factor} must be less than high_freq_factor = {self.high_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """A decoder: DeepSeek-V3 (MLA + mixture of experts + MTP), or a dense GQA model (Llama, Qwen2).

    Widths are in elements. Fields of the other architecture must keep their defaults.
    """

    architecture: Architecture = "deepseek_v3"
    vocab_size: int = Field(gt=0, description="rows of the embedding; may exceed the tokenizer's size")
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    max_positions: int = Field(ge=1, description="longest sequence, in tokens")
    ffn_hidden_size: int = Field(ge=1, description="width of a dense SwiGLU layer")
    norm_eps: float = Field(1e-6, gt=0)
    rope_base: float = Field(10000.0, gt=0)
    yarn: YarnConfig | None = None
    llama3_rope: Llama3RopeConfig | None = None
    tie_embeddings: bool = False
    init_std: float = Field(0.02, gt=0)

    # dense GQA models
    num_kv_heads: int | None = None
    head_dim: int | None = None

    # multi-head latent attention
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    # mixture of experts
    num_dense_layers: int = Field(0, ge=0, description="leading layers whose FFN is dense")
    num_experts: int = Field(0, ge=0)
    experts_per_token: int = Field(0, ge=0)
    num_shared_experts: int = Field(0, ge=0)
    expert_hidden_size: int = Field(0, ge=0)
    num_expert_groups: int = Field(1, ge=1)
    groups_per_token: int = Field(1, ge=1)
    routed_scaling_factor: float = 1.0
    expert_bias_update_speed: float = Field(0.0, ge=0)

    # multi-token prediction
    num_mtp_layers: int = Field(0, ge=0)
    mtp_loss_weight: float = Field(0.0, ge=0)

    @property
    def is_moe(self) -> bool:
        return self.architecture == "deepseek_v3" and self.num_experts > 0

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        if self.architecture == "deepseek_v3":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def cached_width(self, tensor: int) -> int:
        """Numbers that the cache holds of a token in one layer, on one of `tensor` tensor-parallel ranks: MLA's latent,
        whole on each of them, or the keys and values of its heads."""
        if self.architecture == "deepseek_v3":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.qk_head_dim // tensor

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.yarn and self.llama3_rope:
            raise ValueError("yarn and llama3_rope are two ways to extend the context: one of them must be left out")
        if self.architecture == "deepseek_v3":
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} = {getattr(self, name)} must be positive for architecture deepseek_v3")
            if self.qk_rope_head_dim % 2:
                raise ValueError(f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even")
            if self.num_experts:
                self._check_experts()
        else:
            if self.num_experts or self.num_mtp_layers:
                raise ValueError(f"num_experts and num_mtp_layers must be 0 for architecture {self.architecture}")
            if self.num_heads % self.kv_heads:
                raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.kv_heads}")
            if self.head_dim is None and self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size = {self.hidden_size} must be a multiple of num_heads = {self.num_heads}"
                    " unless head_dim is given"
                )
        if self.num_dense_layers > self.num_layers:
            raise ValueError(f"num_dense_layers = {self.num_dense_layers} exceeds num_layers = {self.num_layers}")
        return self

    def _check_experts(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} must be between 1 and num_experts = {self.num_experts}"
            )
        if self.expert_hidden_size < 1:
            raise ValueError(f"expert_hidden_size = {self.expert_hidden_size} must be positive")
        if self.num_experts % self.num_expert_groups:
            raise ValueError(
                f"num_expert_groups = {self.num_expert_groups} must divide num_experts = {self.num_experts}"
            )
        if self.groups_per_token > self.num_expert_groups:
            raise ValueError(
                f"groups_per_token = {self.groups_per_token} exceeds num_expert_groups = {self.num_expert_groups}"
            )
        reachable = self.num_experts // self.num_expert_groups * self.groups_per_token
        if self.experts_per_token > reachable:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} exceeds the {reachable} experts"
                " that groups_per_token leaves"
            )


class ParallelConfig(Section):
    """How one model is split over processes. Data parallelism is what remains of the world."""

    tensor: int = Field(1, ge=1)
    sequence: bool = Field(True, description="sequence parallelism, where tensor > 1")
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int = Field(1, ge=1, description="model chunks per pipeline rank")
    pipeline_layout: str = Field(
        "",
        description="what each of the pipeline x virtual_pipeline stages holds, in Megatron's letters: E embedding,"
        " t layer, m MTP layer, L loss, | between stages, (...)*n; default: as even as it goes",
    )
    expert: int = Field(1, ge=1)
    expert_tensor: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="selective: norms, dense MLPs and the up-projections of MLA; full: every layer"
    )
    overlap_expert_exchange: bool = Field(
        False, description="Megatron's combined 1F1B: one micro-batch's products hide another's exchange among experts"
    )
    overlap_shared_experts: bool = Field(
        False, description="the shared experts compute while tokens are exchanged among the routed ones"
    )
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    fp8: Literal["off", "block", "transformer_engine"] = Field(
        "off", description="products of the layers' linears and experts in FP8: by our kernels, or linears by NVIDIA's"
    )
    numerics: Literal["fast", "exact"] = Field(
        "fast", description="exact: rollout and training give the same log-probabilities, bit for bit"
    )
    timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="within which the watchdog names a hang and ends the run: of 600 a collective may take 520",
    )

    @property
    def token_multiple(self) -> int:
        """What the tokens of a forward must divide by: sequence parallelism's split, in parts that
        TransformerEngine's FP8 takes."""
        split = self.tensor if self.sequence else 1
        return split * (16 if self.fp8 == "transformer_engine" else 1)

    def data(self, world_size: int) -> int:
        """The data-parallel size in a world of `world_size` processes; ValueError where the layout does not fit."""
        model = self.tensor * self.pipeline * self.context
        if world_size % model:
            raise ValueError(
                f"parallel.tensor x pipeline x context = {self.tensor} x {self.pipeline} x {self.context} = {model}"
                f" must divide the world size {world_size}"
            )
        expert = self.expert * self.expert_tensor * self.pipeline
        if world_size % expert:
            raise ValueError(
                f"parallel.expert x expert_tensor x pipeline = {self.expert} x {self.expert_tensor} x {self.pipeline}"
                f" = {expert} must divide the world size {world_size}"
            )
        return world_size // model

    def check_model(self, model: ModelConfig) -> None:
        """ValueError where the layout does not divide the model, or wants a package that is not here."""
        if self.fp8 == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
            raise ValueError(
                "parallel.fp8 = transformer_engine needs the package transformer_engine, which is not installed;"
                " wanted pip install 'r1[cuda]', or fp8 = block"
            )
        if self.numerics == "exact":
            for axis, value, wanted in (
                ("fp8", self.fp8, "off"), ("tensor", self.tensor, 1), ("expert_tensor", self.expert_tensor, 1),
            ):  # fmt: skip
                if value != wanted:
                    raise ValueError(
                        f"parallel.{axis} = {value} is not possible with numerics = exact, wanted {wanted}"
                    )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline > 1")
        parts = [("num_heads", model.num_heads, "tensor", self.tensor)]
        if model.architecture != "deepseek_v3":
            parts.append(("num_kv_heads", model.kv_heads, "tensor", self.tensor))
        parts.append(("ffn_hidden_size", model.ffn_hidden_size, "tensor", self.tensor))
        parts.append(("vocab_size", model.vocab_size, "tensor", self.tensor))
        stages = self.pipeline * self.virtual_pipeline
        if self.pipeline_layout:
            self._check_layout(model)
        elif stages > model.num_layers:
            raise ValueError(
                f"parallel.pipeline x virtual_pipeline = {stages} leaves stages empty:"
                f" model.num_layers = {model.num_layers}"
            )
        if model.is_moe:
            parts.append(("num_experts", model.num_experts, "expert", self.expert))
            parts.append(("expert_hidden_size", model.expert_hidden_size, "expert_tensor", self.expert_tensor))
            if self.tensor > 1 and not self.sequence:
                raise ValueError(
                    "parallel.sequence = false with tensor > 1 is not possible for a mixture of experts:"
                    " megatron-core needs sequence parallelism there"
                )
            if self.overlap_shared_experts and (not model.num_shared_experts or self.expert == 1):
                raise ValueError(
                    "parallel.overlap_shared_experts needs model.num_shared_experts and an exchange to hide behind:"
                    f" parallel.expert = {self.expert}, wanted 2 or more"
                )
            if self.overlap_expert_exchange:
                self._check_overlap(model)
        elif self.expert > 1 or self.expert_tensor > 1:
            raise ValueError(f"parallel.expert = {self.expert} needs a mixture of experts; the model is dense")
        for name, size, axis, ways in parts:
            if size % ways:
                raise ValueError(f"parallel.{axis} = {ways} does not divide model.{name} = {size}")

    def _check_overlap(self, model: ModelConfig) -> None:
        """ValueError where Megatron's combined schedule cannot be had."""
        for holds, axis, wanted in (
            (
                model.num_dense_layers < model.num_layers,
                "overlap_expert_exchange",
                "a mixture of experts in the last layer",
            ),
            (1 < self.expert < model.num_experts, "expert", f"2 or more, and less than {model.num_experts}"),
            (self.dispatcher != "allgather", "dispatcher", "alltoall or flex"),
            (self.recompute != "full", "recompute", "none or selective"),
            (not self.overlap_shared_experts, "overlap_shared_experts", "false: only one of the two can be"),
            (self.pipeline == 1 or self.virtual_pipeline > 1, "virtual_pipeline", "2 or more, with pipeline > 1"),
            (self.numerics == "fast", "numerics", "fast"),
        ):
            if not holds:
                value = getattr(self, axis)
                raise ValueError(
                    f"parallel.{axis} = {value} is not possible with overlap_expert_exchange, wanted {wanted}"
                )

    def stages(self, model: ModelConfig) -> list[str]:
        """What each stage holds, in `pipeline_layout`'s letters; stage i is on pipeline rank i mod `pipeline`. Where
        the layers do not divide, the first stages take one more, as the last has the head."""
        if self.pipeline_layout:
            text = re.sub(r"\s", "", self.pipeline_layout)
            text = re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m[1] * int(m[2]), text)
            text = re.sub(r"(\w)\*(\d+)", lambda m: m[1] * int(m[2]), text)
            return (text if model.num_mtp_layers else text.replace("m", "")).split("|")  # a reward model has none
        count = self.pipeline * self.virtual_pipeline
        fewest, more = divmod(model.num_layers, count)
        parts = ["t" * (fewest + (stage < more)) for stage in range(count)]
        parts[0] = "E" + parts[0]
        parts[-1] += "m" * model.num_mtp_layers + "L"
        return parts

    def _check_layout(self, model: ModelConfig) -> None:
        """ValueError where the letters are not this model's, or not so many stages."""
        parts, count = self.stages(model), self.pipeline * self.virtual_pipeline
        flat = "".join(parts)
        if flat != "E" + "t" * model.num_layers + "m" * model.num_mtp_layers + "L" or len(parts) != count:
            raise ValueError(
                f"parallel.pipeline_layout = {self.pipeline_layout!r} has {flat.count('t')} t and {flat.count('m')} m"
                f" in {len(parts)} stages, wanted E, {model.num_layers} t, {model.num_mtp_layers} m and L in {count}"
            )
        if not parts[-1].endswith("m" * model.num_mtp_layers + "L"):
            raise ValueError(
                f"parallel.pipeline_layout = {self.pipeline_layout!r} parts the MTP layer from the loss, wanted both in"
                " the last stage"
            )
