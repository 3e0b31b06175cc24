"""Which implementation runs an operator, and how operators enter torch.library.

A family has implementations, Python modules with the same function names: `torch` (reference.py, the definition),
perhaps `triton`, `cuda` and `cpu` (in C++), and `flash_attn` in one family. R1_KERNELS=cuda|triton|flash_attn|cpu|torch
forces one, R1_KERNELS=grpo=triton,moe=torch one for some families; `auto`, the default, takes the first of them that
has passed its tests on this kind of device.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "flash_attn", "cpu", "torch")  # in the order that `auto` prefers

NEEDS = {
    "cuda": ("triton", "r1._cuda"),
    "triton": ("triton",),
    "flash_attn": ("triton", "flash_attn"),
    "cpu": ("r1._cpu",),
}
DEVICE_OF = {"cuda": "cuda", "flash_attn": "cuda", "cpu": "cpu"}

LIBRARY = torch.library.Library("r1", "DEF")

_implementations: dict[str, dict[str, ModuleType | str]] = {}
_proven: dict[tuple[str, str], frozenset[str]] = {}


def register(family: str, backend: str, module: ModuleType | str, proven_on: tuple[str, ...]) -> None:
    """Adds an implementation; `proven_on` names the device types ("cpu", "cuda") where `auto` may take it.

    A module given by its name is imported when it is first wanted. Left out are those whose packages are not installed,
    and those in C++ where r1._cuda or r1._cpu was not built.
    """
    if any(importlib.util.find_spec(package) is None for package in NEEDS.get(backend, ())):
        return
    if backend == "cpu":
        # `auto` takes it: where it was built and does not load, it must not be what an operator fails for.
        try:
            importlib.import_module("r1._cpu")
        except ImportError as error:
            warnings.warn(f"r1._cpu was built and does not load ({error}); plain torch takes its place", stacklevel=2)
            return
    _implementations.setdefault(family, {})[backend] = module
    _proven[family, backend] = frozenset(proven_on)


def backends(family: str, device_type: str) -> list[str]:
    """The names of the backends of `family` that this machine has for tensors on such a device, but for flash_attn,
    which is for some of an operator's inputs. On a CPU Triton, which its interpreter runs, is left out."""
    others = {"cpu": ("triton",)}.get(device_type, ())
    found = (b for b in reversed(BACKENDS) if b in _implementations[family] and b not in ("flash_attn", *others))
    return [b for b in found if DEVICE_OF.get(b, device_type) == device_type]


def backend(family: str, device: torch.device) -> str:
    """The name of the backend that runs `family` on `device`.

    Raises ValueError if R1_KERNELS is no backend's name, or names one that this family or this device does not have.
    """
    available = _implementations[family]
    wanted = os.environ.get("R1_KERNELS") or "auto"
    if "=" in wanted:
        choices = dict(choice.partition("=")[::2] for choice in wanted.split(","))
        if unknown := choices.keys() - _implementations.keys():
            raise ValueError(
                f"R1_KERNELS names the family {min(unknown)!r}, wanted {', '.join(sorted(_implementations))}"
            )
        wanted = choices.get(family, "auto")
    if wanted == "auto":
        proven = (b for b in BACKENDS if b in available and device.type in _proven[family, b])
        wanted = next(proven, "torch")
    if wanted not in BACKENDS:
        raise ValueError(f"R1_KERNELS is {wanted!r}, wanted one of auto, {', '.join(BACKENDS)}")
    if wanted not in available:
        raise ValueError(f"R1_KERNELS is {wanted!r}, but the {family} family has only: {', '.join(available)}")
    if device.type != DEVICE_OF.get(wanted, device.type):
        raise ValueError(f"R1_KERNELS is {wanted!r}, but the tensors are on {device}")
    if wanted == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("R1_KERNELS is 'triton', but tensors on a CPU need Triton's interpreter: TRITON_INTERPRET=1")
    return wanted


def implementation(family: str, device: torch.device) -> ModuleType:
    """The module that runs `family` on `device`; raises as backend() does."""
    name = backend(family, device)
    module = _implementations[family][name]
    if isinstance(module, str):
        module = _implementations[family][name] = importlib.import_module(module)
    return module


def operator(
    family: str | None,
    schema: str,
    fake: Callable[..., Any],
    save: Callable[[Any, tuple, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Defines r1::<name> from its schema and returns it. Calling it runs the chosen implementation's <name>.

    `fake` gives the outputs' shapes; `save(ctx, inputs, output)` and `backward(ctx, *gradients)` the gradients. With
    no family it is made of other operators, and `fake`, which calls them, is what runs.
    Library.define costs a fifth of what torch.library.custom_op does per call, which counts for the small model.
    Schemas carry no default values: callers pass every argument.
    """
    name = schema.split("(")[0]

    def run(*arguments: Any) -> Any:
        if family is None:
            return fake(*arguments)
        device = _device(arguments)
        function = getattr(implementation(family, device), name)
        if device.type != "cuda":
            return function(*arguments)
        with torch.cuda.device(device):  # Triton launches on the current device, whichever the tensors' is
            return function(*arguments)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"r1::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.r1, name).default
    if not overload._schema.is_mutable:

        def no_gradient(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError(f"r1::{name} has no gradient")

        torch.library.register_autograd(f"r1::{name}", backward or no_gradient, setup_context=save, lib=LIBRARY)
    return overload


def _device(arguments: tuple) -> torch.device:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0].device
    return torch.device("cpu")


def require(holds: bool, argument: str, value: object, wanted: str) -> None:
    """Raises the ValueError that every operator gives for a bad argument."""
    if not holds:
        raise ValueError(f"{argument} is {describe(value)}, wanted {wanted}")


def describe(value: object) -> str:
    """A tensor by its shape, type and device; a tuple by its parts; anything else as it prints."""
    if isinstance(value, Tensor):
        return f"a {tuple(value.shape)} tensor of {str(value.dtype).removeprefix('torch.')} on {value.device}"
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    return repr(value)


def wide(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: float64 if any input has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
