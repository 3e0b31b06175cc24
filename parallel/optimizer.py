"""AdamW, the gradient norm and clipping on r1's kernels, behind Megatron's distributed optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from r1.kernels import adamw_step, grad_norm


class AdamW(torch.optim.Optimizer):
    """AdamW on r1's kernel, with the step count in the parameter group, where Megatron's distributed optimiser
    expects it: torch's own shares one step tensor between parameters there and resumes with a wrong bias correction."""

    moments = torch.float32  # the type that they are kept in
    grad_scale = 1.0  # what a step takes gradients times

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **ignored: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def initialize_state(self, p: Tensor) -> None:
        if not self.state[p]:
            self.state[p] = {name: torch.zeros_like(p, dtype=self.moments) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            group["step"] += 1
            if not parameters:
                continue
            for p in parameters:
                self.initialize_state(p)
            adamw_step(
                [p.data for p in parameters],
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                int(group["step"]),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=self.grad_scale,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would make the moments of the parameters' type."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, parameters, strict=True):
            if state := state_dict["state"].get(number):
                self.state[p] = {name: value.to(p.device, self.moments) for name, value in state.items()}


class ChainedAdamW(ChainedOptimizer):
    """Megatron's optimisers, of the dense and of the expert parameters, with a step that clips on the way: Megatron's
    own would read and write all gradients once more, where the kernel takes them times the coefficient."""

    def __init__(self, parts: Sequence[MegatronOptimizer], moments: torch.dtype, offload: bool = False) -> None:
        super().__init__(list(parts))
        self.offload, self.on_host = offload, False
        for part in parts:
            part.optimizer.moments = moments
            for group in part.optimizer.param_groups:
                for p in group["params"]:
                    part.optimizer.initialize_state(p)  # a checkpoint may come before the first step
        self.to_host()

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, None]:
        """(whether it was taken, the norm of all gradients before clipping, None for Megatron's count of zeros)."""
        self.to_device()
        if self.prepare_grads():
            self.to_host()
            return False, None, None
        norm = self.get_grad_norm()
        clip = self.config.clip_grad
        for part in self.chained_optimizers:
            part.optimizer.grad_scale = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        done = self.step_with_ready_grads()
        self.to_host()
        return done, norm, None

    def to_host(self) -> None:
        """With `offload`, moments and master weights lie in host memory between steps, when activations need the
        device's. (Where the model is float32 itself, it has no master weights.)"""
        if self.offload and not self.on_host:
            self._move(host_copy)
        self.on_host = self.offload

    def to_device(self) -> None:
        """Brings them back, for a step or whoever else reads them."""
        if self.on_host:
            device = self.chained_optimizers[0].model_chunks[0].buffers[0].grad_data.device
            self._move(functools.partial(device_copy, device=device))
        self.on_host = False

    def _move(self, moved: Callable[[Tensor], Tensor]) -> None:
        for part in self.chained_optimizers:
            for masters in part.shard_fp32_from_float16_groups:
                for p in masters:
                    p.grad, p.data = None, moved(p.data)
            for state in part.optimizer.state.values():
                for name, value in state.items():
                    state[name] = moved(value)

    def sharded_state_dict(self, *args: Any, **options: Any) -> Any:
        """Of the state on the device; whoever has written it calls to_host()."""
        self.to_device()
        return super().sharded_state_dict(*args, **options)

    def load_state_dict(self, state_dict: Any) -> None:
        self.to_device()
        super().load_state_dict(state_dict)
        self.to_host()

    def reload_model_params(self, *args: Any, **options: Any) -> None:
        self.to_device()
        super().reload_model_params(*args, **options)
        self.to_host()


def host_copy(x: Tensor) -> Tensor:
    """x in host memory, page-locked where a GPU is to read it."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def device_copy(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=True)


def l2_norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Of all tensors together, shape (1,), with the signature of Apex's kernel, which Megatron's norm calls; the sum
    over the processes stays Megatron's."""
    return grad_norm(lists[0]).reshape(1), None
