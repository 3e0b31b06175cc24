"""examples/grpo_fsdp.py: two processes, each with a part of the batch, against one process with the whole."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.kernels.helpers import spawn_pair

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo_fsdp.py"
TOLERANCE = 1e-5
# Completions of the two ranks: unlike in number, and once with no token to learn from on one of them.
SPLITS = ((3, 5), (6, 2), (4, 4))


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_grpo_fsdp", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_batch(example: ModuleType, policy: torch.nn.Module, sizes: tuple[int, int], ratio: str) -> list[Tensor]:
    """Tokens, where completions are, old log-probabilities (in the place of each token), advantages. Ratios lie on both
    sides of the bounds and not close to them, so that rounding decides nothing."""
    S, P, L = sum(sizes), example.PROMPT, example.PROMPT + example.COMPLETION
    lengths_S = torch.randint(1, example.COMPLETION + 1, (S,))
    if sizes[0] == sizes[1]:
        lengths_S[sizes[0] :] = 0
    tokens_SL = torch.randint(example.VOCABULARY, (S, L))
    positions_L = torch.arange(L)
    completion_SL = (positions_L >= P) & (positions_L < P + lengths_S[:, None])
    with torch.no_grad():
        logprobs_T = policy(tokens_SL, *example.pack(tokens_SL, completion_SL))
    shape = (S, 1 if ratio == "sequence" else L)
    log_ratio_SL = torch.tensor([-0.5, -0.1, 0.1, 0.5])[torch.randint(4, shape)] + 0.02 * torch.randn(S, L)
    old_SL = torch.zeros(S, L).masked_scatter(completion_SL, logprobs_T) - log_ratio_SL
    return [tokens_SL, completion_SL, old_SL, torch.randn(S)]


def step_loss(
    example: ModuleType,
    policy: torch.nn.Module,
    batch: list[Tensor],
    counts: tuple[int, int],
    aggregation: str,
    ratio: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    tokens_SL, completion_SL, old_SL, advantages_S = batch
    return example.grpo_step_loss(
        policy, tokens_SL, completion_SL, old_SL[completion_SL], advantages_S, counts, aggregation, ratio=ratio
    )


def compare_with_one_process(rank: int) -> None:
    example = load_example()
    whole = example.Policy()  # spawn_pair gives both processes the same seed: the same weights and batches
    sharded = example.Policy()
    sharded.load_state_dict(whole.state_dict())
    example.shard(sharded, init_device_mesh("cpu", (2,)))

    for sizes, aggregation, ratio in itertools.product(
        SPLITS, ("sequence_mean", "token_mean", "constant"), ("token", "sequence")
    ):
        batch = random_batch(example, whole, sizes, ratio)
        own = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        part = [x[own] for x in batch]
        loss, metrics = step_loss(example, sharded, part, example.count_over_ranks(part[1]), aggregation, ratio)
        (2 * loss).backward()
        sums = torch.stack([loss.detach(), *metrics.values()])
        dist.all_reduce(sums)

        counts = (sum(sizes), int(batch[1].sum()))
        expected, expected_metrics = step_loss(example, whole, batch, counts, aggregation, ratio)
        expected.backward()

        size = float(batch[3].abs().max())  # of the terms that the loss adds up: they may cancel
        expected_sums = torch.stack([expected.detach(), *expected_metrics.values()])
        torch.testing.assert_close(sums[0], expected_sums[0], rtol=TOLERANCE, atol=TOLERANCE * size)
        torch.testing.assert_close(sums[1:], expected_sums[1:], rtol=TOLERANCE, atol=TOLERANCE)
        for (name, parameter), wanted in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            gradient = parameter.grad.full_tensor()
            atol = TOLERANCE * float(wanted.grad.abs().max())
            torch.testing.assert_close(gradient, wanted.grad, rtol=TOLERANCE, atol=atol, msg=f"gradient of {name}")
        sharded.zero_grad()
        whole.zero_grad()


def test_two_processes_compute_what_one_does(seed: int) -> None:
    spawn_pair(compare_with_one_process, seed)


def test_main_runs_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.startswith("step")]
    rewards = [float(words[3]) for words in lines]
    assert len(rewards) == 12
    assert rewards[-1] > rewards[0] + 0.2
