"""A model in its layout, with Megatron's schedules, gradient reduction and distributed optimiser around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from pydantic import Field, model_validator
from torch import Tensor

from r1.kernels import numerics
from r1.parallel.config import ModelConfig, ParallelConfig, Section, check_moments
from r1.parallel.fp8 import forget_quantized
from r1.parallel.loss import Loss
from r1.parallel.model import DTYPES, DecoderModel, build, rope_for, stream_multiple
from r1.parallel.optimizer import ChainedAdamW
from r1.parallel.packing import MicroBatch, empty_like, pack, pad_to
from r1.parallel.world import World


class AdamConfig(Section):
    """AdamW, as Megatron's distributed optimiser runs it."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="type that both moments are kept in; bfloat16 takes 4 bytes a parameter less"
    )
    offload: bool = Field(False, description="moments and master weights lie in host memory between steps")

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_moments(self.moments, (self.beta1, self.beta2))
        return self


class Trainer:
    """One model on this process's part of the world. With `adam` it can be trained; without it only be read.

    `seed` None leaves the weights undrawn: a whole matrix in float32 at a time is much to draw for nothing."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        world: World,
        *,
        seed: int | None = 0,
        adam: AdamConfig | None = None,
        value_head: bool = False,
    ) -> None:
        self.model_config, self.parallel, self.world = model, parallel, world
        self.value_head = value_head
        self.rope_tables = rope_for(model)
        self.chunks: list[DecoderModel] = build(model, parallel, world, seed, value_head)
        self.wrapped: list[Any] = list(self.chunks)
        self.optimizer: Any = None
        self.adam = adam
        self.steps_taken = 0
        self._weights_on_their_way = False
        if adam is not None:
            self._make_trainable(adam)

    def _make_trainable(self, adam: AdamConfig) -> None:
        parallel = self.parallel
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            check_for_nan_in_grad=False,
        )
        self.wrapped = [
            DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0, pg_collection=self.world.groups)
            for i, chunk in enumerate(self.chunks)
        ]
        config = self.chunks[0].config
        config.finalize_model_grads_func = _sum_gradients
        config.no_sync_func = None
        if parallel.overlap_grad_reduce:
            config.no_sync_func = [w.no_sync for w in self.wrapped]
            if len(self.wrapped) == 1:
                config.no_sync_func = config.no_sync_func[0]
        bf16 = DTYPES[parallel.dtype] is torch.bfloat16
        chain = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=0.0,
                min_lr=0.0,
                weight_decay=adam.weight_decay,
                adam_beta1=adam.beta1,
                adam_beta2=adam.beta2,
                adam_eps=adam.eps,
                clip_grad=adam.clip_grad,
                bf16=bf16,
                params_dtype=DTYPES[parallel.dtype],
                use_distributed_optimizer=True,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            self.wrapped,
            use_gloo_process_groups=torch.cuda.is_available(),
        )
        self.optimizer = ChainedAdamW(chain.chained_optimizers, DTYPES[adam.moments], adam.offload)

    # ------------------------------------------------------------------------------------------------ one step

    def train_step(self, micro_batches: list[MicroBatch], loss: Loss, lr: float) -> dict[str, float]:
        """Forward, backward and one optimiser update over this replica's micro-batches.

        Every replica passes the same number of them. Returns the sums of the loss's metrics over the whole step, with
        `grad_norm`. RuntimeError, before the weights change, where the gradient is not finite.
        """
        if self.optimizer is None or self.adam is None:
            raise RuntimeError("this model was built without an optimiser")
        for module in self.wrapped:
            module.train()
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        biases = [(b, b.clone()) for c in self.chunks for name, b in c.named_buffers() if name.endswith("expert_bias")]
        outputs = self._schedule(micro_batches, functools.partial(_loss_of, loss=loss), forward_only=False)
        metrics = self._reduce_metrics(outputs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            # Megatron leaves it to a scheduler to spare norms and biases.
            group["weight_decay"] = self.adam.weight_decay * group["wd_mult"]
        if not self._gradient_is_finite():
            for bias, before in biases:  # moved with the reductions
                bias.copy_(before)
            raise RuntimeError(f"a gradient is not finite (loss {metrics['loss']}); the weights were left as they were")
        _, grad_norm, _ = self.optimizer.step()
        forget_quantized(self.chunks)
        self._weights_on_their_way = self.parallel.overlap_param_gather
        self.steps_taken += 1
        metrics["grad_norm"] = float(grad_norm)
        return metrics

    def gather_weights(self) -> None:
        """With `overlap_param_gather` the next training forward fetches the updated weights from the other replicas;
        whoever reads them before must fetch them first. Collective."""
        if self._weights_on_their_way:
            for module in self.wrapped:
                module.start_param_sync(force_sync=True)
            self._weights_on_their_way = False

    def _gradient_is_finite(self) -> bool:
        buffers = [b for w in self.wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
        bad = torch.zeros((), device=self.world.device)
        for buffer in buffers:
            bad += ~torch.isfinite(buffer.grad_data.sum())
        dist.all_reduce(bad)
        return not bool(bad)

    def read(self, micro_batches: list[MicroBatch], function: Callable[..., Tensor]) -> list[Tensor]:
        """`function(model, hidden, batch, pack)` of each micro-batch without gradients.

        A function returns rows for the whole stream of tokens (or for the sequences); they come back on every process
        of the replica, without the padding.
        """
        self.gather_weights()
        for module in self.wrapped:
            module.eval()
        with torch.no_grad():
            outputs = self._schedule(micro_batches, functools.partial(_rows_of, function=function), forward_only=True)
        outputs = self._from_last_stage(outputs)
        return [x[: b.tokens_T.numel()] for x, b in zip(outputs, micro_batches)]

    def _schedule(self, micro_batches: list[MicroBatch], finish: functools.partial, forward_only: bool) -> list[Any]:
        batches = self._padded(micro_batches)
        uses_mtp = getattr(finish.keywords.get("loss"), "uses_mtp", False) and not self.value_head
        mtp_depth = self.model_config.num_mtp_layers if uses_mtp else 0
        schedule = numerics(self.parallel.numerics)(get_forward_backward_func())

        def forward_step(
            iterator: Iterator[MicroBatch], module: Any, return_schedule_plan: bool = False
        ) -> tuple[Any, Callable]:
            batch = next(iterator)
            model = module.module if isinstance(module, DistributedDataParallel) else module
            packed = pack(batch, self.world, self.rope_tables, mtp_depth)
            forward = model.schedule_plan if return_schedule_plan else module
            return (
                forward(packed.local(batch.tokens_T), packed),
                functools.partial(finish, model=model, batch=batch, packed=packed),
            )

        iterators = [iter(batches) for _ in self.wrapped]
        length = batches[0].tokens_T.numel()
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.wrapped if len(self.wrapped) > 1 else self.wrapped[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _padded(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        if not micro_batches:
            raise ValueError("a step needs at least one micro-batch on every replica")
        if self.parallel.virtual_pipeline > 1:
            # Interleaved stages take micro-batches in rounds of the pipeline's length.
            missing = -len(micro_batches) % self.parallel.pipeline
            micro_batches = [*micro_batches, *[empty_like(micro_batches[0])] * missing]
        multiple = stream_multiple(self.parallel)
        lengths = [max(multiple, -(-b.tokens_T.numel() // multiple) * multiple) for b in micro_batches]
        if self.parallel.pipeline > 1:
            # Pipeline stages exchange activations of one shape.
            lengths = [max(lengths)] * len(lengths)
        lengths = self.common_lengths(lengths)
        result = []
        for batch, length in zip(micro_batches, lengths, strict=True):
            real = batch.tokens_T.numel()
            padded = pad_to(batch, length)
            padded.sequence_fields = dict(padded.sequence_fields)
            padded.sequence_fields["real"] = batch.cu_seqlens[1:]
            if length > real:
                padding = batch.fields.get("padding", torch.zeros_like(batch.tokens_T, dtype=torch.bool))
                padded.fields["padding"] = torch.nn.functional.pad(padding, (0, length - real), value=True)
            result.append(padded)
        return result

    def common_lengths(self, lengths: list[int]) -> list[int]:
        """Megatron's allgather dispatcher needs equally many tokens on every rank; others take them as they are."""
        experts = self.parallel.expert * self.parallel.expert_tensor
        if self.parallel.dispatcher != "allgather" or not self.model_config.is_moe or experts == 1:
            return lengths
        longest = torch.tensor(lengths, device=self.world.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        return longest.tolist()

    # ------------------------------------------------------------------------------------------------ reductions

    def _from_last_stage(self, outputs: list[Any]) -> list[Any]:
        if self.world.pipeline_size == 1:
            return outputs
        group = self.world.groups.pp
        box = [outputs if self.world.is_last_stage else None]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, self.world.pipeline_size - 1), group=group)
        return box[0]  # type: ignore[return-value]

    def _reduce_metrics(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for metrics in outputs:
            for name, value in metrics.items():
                value = value.detach().double()
                if name not in sums:
                    sums[name] = value
                else:
                    sums[name] = torch.maximum(sums[name], value) if name.endswith("_max") else sums[name] + value
        if self.world.is_last_stage and self.world.data_size * self.world.context_size > 1:
            for wanted, operation in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
                names = sorted(n for n in sums if n.endswith("_max") == wanted)
                if names:
                    stacked = torch.stack([sums[n] for n in names])
                    dist.all_reduce(stacked, op=operation, group=self.world.groups.dp_cp)
                    sums.update(zip(names, stacked.unbind(), strict=True))
        return self._from_last_stage([{name: float(value) for name, value in sums.items()}])[0]


def _hidden_by_depth(model: DecoderModel, output: Tensor, packed: Any) -> list[Tensor]:
    """The last stage's output as (T, H) for the model and each MTP depth that ran."""
    depths = 1 + len(packed.next_tokens)
    return [model.hidden_of_all_tokens(part) for part in output.chunk(depths, 0)]


def _loss_of(output: Tensor, *, model: DecoderModel, batch: MicroBatch, packed: Any, loss: Loss) -> tuple:
    value, metrics = loss(model, _hidden_by_depth(model, output, packed), batch, packed)
    return value, torch.zeros((), dtype=torch.int), metrics


def _rows_of(
    output: Tensor, *, model: DecoderModel, batch: MicroBatch, packed: Any, function: Any, non_loss_data: bool
) -> Tensor:
    return function(model, _hidden_by_depth(model, output, packed), batch, packed)


def _sum_gradients(model: list[Any], num_tokens: Any = None, **options: Any) -> None:
    """Megatron's reductions without its division by the token count: the loss weights hold the normalisation."""
    finalize_model_grads(model, None, **options)
