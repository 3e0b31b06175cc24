"""What the kernel tests share."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1.bench._ahead_of_time import Binary
from r1.bench.static import fault


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def ragged(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def spawn_pair(function: Callable[[int], None], seed: int) -> None:
    """Runs function(rank) in two processes joined by gloo, both with this seed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_join_and_run, args=(function, port, seed), nprocs=2)


def _join_and_run(rank: int, function: Callable[[int], None], port: int, seed: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(seed)
    function(rank)
    torch.distributed.destroy_process_group()


def same_as_plain(
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    what: str,
    floor: float = 3e-6,
    size: float | None = None,
    more: float = 0.0,
) -> None:
    """The accuracy rule: at most twice the plain version's largest error.

    Where the elements are so few that the plain version may be exact by chance, there is more room: half a last bit of
    a result that is not float32, and `floor` (float32's last bits: on a GPU a product is three of TF32) times `size`,
    that of the terms added up, or else of the result. `more` is what cancellation leaves.
    """
    error, room, largest = (
        x.abs().max().item() if exact.numel() else 0.0 for x in (got.double() - exact, plain.double() - exact, exact)
    )
    assert got.isfinite().all(), what
    rounding = torch.finfo(got.dtype).eps / 2 * largest if got.dtype.itemsize < 4 else 0.0
    limit = 2 * room + rounding + floor * (largest if size is None else size) + more
    assert error <= limit, f"{what}: {error:.2e}, plain torch {room:.2e}, allowed {limit:.2e}"


def assert_fits(binary: Binary, uses_matrix_units: bool) -> None:
    assert fault(binary) is None, f"{fault(binary)}: {binary}"
    if uses_matrix_units:
        assert {"HGMMA", "QGMMA"} & binary.matrix_instructions.keys(), f"does without warp-group MMA: {binary}"


def check_operator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """torch.library's own checks on every r1 operator that a call reaches, forward and backward, then
    torch.compile(fullgraph=True) against the plain call."""
    calls: list[tuple[Any, tuple]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if op.namespace == "r1":
                copy = lambda x: x.detach().clone() if isinstance(x, Tensor) else x
                calls.append((op, tuple([copy(y) for y in x] if isinstance(x, list) else copy(x) for x in args)))
            return op(*args, **(kwargs or {}))

    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    with Record():
        eager = _outputs(function(*args, **kwargs))
        if leaves:
            eager_grads = torch.autograd.grad(_scalar(eager), leaves, allow_unused=True)
    assert calls, "no r1 operator was called"
    for op, arguments in {op.name(): (op, arguments) for op, arguments in calls}.values():
        if op.name().endswith(("_backward", "_wgrad", "_decode")) or len(op._schema.returns) == 0:
            torch.library.opcheck(op, arguments)
            continue
        arguments = tuple(_requiring_grad(x) for x in arguments)
        # opcheck's own harness adds all outputs together, which fails for integers and float8.
        floating = all(x.dtype in (torch.float32, torch.float64) for x in _outputs(op(*arguments)))
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, arguments, test_utils=checks if floating else checks[:3])
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs = _outputs(compiled(*args, **kwargs))
    for a, b in zip(eager, outputs, strict=True):
        torch.testing.assert_close(a, b)
    if leaves:
        for a, b in zip(eager_grads, torch.autograd.grad(_scalar(outputs), leaves, allow_unused=True), strict=True):
            torch.testing.assert_close(a, b)


def _requiring_grad(x: Any) -> Any:
    differentiable = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)
    return x.clone().requires_grad_() if differentiable else x


def _outputs(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = result.values()
    return [x for part in result for x in _outputs(part)] if result is not None else []


def _scalar(outputs: list[Tensor]) -> Tensor:
    return sum((x.float().square().sum() for x in outputs if x.requires_grad), torch.zeros(()))
