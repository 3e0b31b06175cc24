"""Megatron-core assumes CUDA in places that have no switch. On a CPU this file answers for CUDA; on a GPU it only
repairs what megatron-core 0.16 needs without TransformerEngine, and puts our optimiser in place. Nothing else in r1
knows about either."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from typing import Any

# Dynamo would compile Megatron's small jitted functions on their first call: 17 s on a CPU, for nothing.
if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

from r1.parallel.optimizer import AdamW, l2_norm

_installed = False


class _NoStream:
    """Stands for a CUDA stream where every operation is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def synchronize(self) -> None: ...


class _NoEvent:
    """And for an event on it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def install() -> None:
    """Make megatron-core usable here; safe to call more than once."""
    global _installed
    if _installed:
        return
    _installed = True
    # A dense layer of ours is not one of Megatron's own classes; it says so once per layer.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    if getattr(moe_utils, "te_general_gemm", None) is not None and not _has_transformer_engine():
        moe_utils.te_general_gemm = None
    if not _has_transformer_engine():
        # Selective recompute passes fp8 = False by default, takes all but None for FP8, and asks TransformerEngine.
        megatron_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    # Our AdamW and norm stand where TransformerEngine's or Apex's would, whether or not either is installed.
    megatron_optimizer.Adam = distrib_optimizer.Adam = AdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    clip_grads.l2_norm_impl = l2_norm
    if not torch.cuda.is_available():
        _answer_for_cuda()


def _has_transformer_engine() -> bool:
    import importlib.util

    return importlib.util.find_spec("transformer_engine") is not None


def _answer_for_cuda() -> None:
    # `with torch.device("meta")` knows the factories by a list made at its first use, which must hold the real ones:
    # else it passes the wrapped ones by, and transformers' from_pretrained silently leaves its rotary tables unset.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "empty_like", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.type = _cuda_type_for_megatron(torch.Tensor.type)
    # It says at every recomputed layer that the CPU's random state moved with the GPU's, which here are one.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None

    cuda = torch.cuda
    cuda.Event = _NoEvent
    cuda.nvtx.range_push = lambda message: 0
    cuda.nvtx.range_pop = lambda: 0
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda device=None: None
    cuda.Stream = _NoStream
    cuda.current_stream = cuda.default_stream = _one_stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # The dispatcher reads the split sizes as numpy; its own copy goes through pinned memory and a stream.
    token_dispatcher.maybe_move_tensor_to_cpu = _to_numpy


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _cuda_type_for_megatron(type_of: Any) -> Any:
    """Megatron's optimiser compares `tensor.type()` with CUDA's names; only it is told so."""

    @functools.wraps(type_of)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron.core.optimizer"):
            return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return result

    return tensor_type


@functools.cache
def _one_stream(device: Any = None) -> _NoStream:
    return _NoStream()


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    if isinstance(tensor, torch.Tensor) and as_numpy:
        return tensor.numpy()
    return tensor
