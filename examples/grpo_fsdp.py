"""r1's fused GRPO loss in a plain loop with FSDP2.

    torchrun --nproc-per-node 2 examples/grpo_fsdp.py

trains a tiny Llama to write even numbers, over gloo on a CPU, over NCCL on GPUs. What to know:

- FSDP2 keeps a slice of each parameter on each rank, as a DTensor, and has it whole only while the module that
  fully_shard wrapped runs. Who reads lm_head.weight from outside gets the slice, and with full_tensor() the whole, but
  its gradient is then not summed over the ranks. So the loss is made inside the forward of the module that has the
  weight: FSDP gathers it there, and reduces its gradient.
- If the head's weight is the embedding's (tied), both must lie in one group: leave out fully_shard(policy.head). The
  root's group then has the weight, and as all runs inside the root's forward nothing else changes.
- The weights of the tokens are normalised over all ranks, so that the ranks' losses add up to the loss. FSDP averages
  gradients over the ranks; the loss is multiplied by their number before the backward.

Letters: S completions, L tokens of prompt and completion, T packed tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaModel

from r1.kernels import aggregation_weights, group_advantages, linear_grpo_loss, linear_logprob

END, VOCABULARY, PROMPT, COMPLETION = 0, 32, 4, 8
PROMPTS_PER_RANK, COMPLETIONS_PER_PROMPT, UPDATES_PER_ROLLOUT = 4, 8, 2
TEMPERATURE = 0.9


class Head(nn.Module):
    """The language model's head and what is made with it. All of it is in forward, where FSDP has the weight whole."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, hidden) * 0.1)

    def forward(self, hidden_TH: Tensor, targets_T: Tensor | None = None, **loss):
        """Without targets the logits, to sample from; with targets their log-probabilities; with the other arguments
        of linear_grpo_loss too, its (loss, metrics)."""
        if targets_T is None:
            return nn.functional.linear(hidden_TH, self.weight) / TEMPERATURE
        if not loss:
            return linear_logprob(hidden_TH, self.weight, targets_T, TEMPERATURE)
        return linear_grpo_loss(hidden_TH, self.weight, targets_T, temperature=TEMPERATURE, **loss)


class Policy(nn.Module):
    """A tiny Llama with this head."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1, use_cache=False, pad_token_id=END,
        )  # fmt: skip
        self.backbone = LlamaModel(config)
        self.head = Head(config.hidden_size, VOCABULARY)

    def forward(self, tokens_SL: Tensor, at_SL: Tensor, targets_T: Tensor | None = None, **loss):
        """What the head makes of the hidden states at the positions where at_SL is set, packed."""
        return self.head(self.backbone(tokens_SL).last_hidden_state[at_SL], targets_T, **loss)


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Splits each layer, the head, and what is left over the ranks. The ranks start from the same weights."""
    for part in (*policy.backbone.layers, policy.head, policy):
        fully_shard(part, mesh=mesh)


@torch.no_grad()
def sample(policy: Policy, prompts_SP: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, (S, L), and where they belong to a completion, up to its end. Every rank makes the same number of calls,
    as the gathering of the weights is a collective."""
    tokens_SL = prompts_SP
    for _ in range(COMPLETION):
        last_SL = torch.zeros_like(tokens_SL, dtype=torch.bool)
        last_SL[:, -1] = True
        next_S1 = policy(tokens_SL, last_SL).softmax(-1).multinomial(1)
        tokens_SL = torch.cat([tokens_SL, next_S1], dim=1)
    completion_SL = torch.arange(tokens_SL.shape[1], device=tokens_SL.device) >= prompts_SP.shape[1]
    ends_SL = (tokens_SL == END) & completion_SL
    return tokens_SL, completion_SL & (ends_SL.cumsum(1) - ends_SL.long() == 0)


def pack(tokens_SL: Tensor, completion_SL: Tensor) -> tuple[Tensor, Tensor]:
    """The positions whose next token is one of a completion, (S, L), and these next tokens, packed."""
    at_SL = completion_SL.roll(-1, dims=1)
    at_SL[:, -1] = False
    return at_SL, tokens_SL[completion_SL]


def count_over_ranks(completion_SL: Tensor) -> tuple[int, int]:
    """How many completions, and how many tokens of completions, all ranks have together."""
    counts = torch.stack([completion_SL.new_ones(len(completion_SL)).sum(), completion_SL.sum()])
    dist.all_reduce(counts)
    sequences, tokens = counts.tolist()
    return sequences, tokens


def grpo_step_loss(
    policy: nn.Module,
    tokens_SL: Tensor,
    completion_SL: Tensor,
    old_logprobs_T: Tensor,
    advantages_S: Tensor,
    counts: tuple[int, int],
    aggregation: str = "token_mean",
    **options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the loss, and of the metrics: with counts over all ranks, the sum over ranks is the whole."""
    at_SL, targets_T = pack(tokens_SL, completion_SL)
    lengths_S = completion_SL.sum(1)
    sequences, tokens = counts
    weights_S = aggregation_weights(
        lengths_S, aggregation, num_sequences=sequences, num_tokens=tokens, constant_length=COMPLETION
    )
    return policy(
        tokens_SL,
        at_SL,
        targets_T,
        old_logprobs_T=old_logprobs_T,
        reference_logprobs_T=None,
        advantages_T=advantages_S.repeat_interleave(lengths_S),
        token_weights_T=weights_S.repeat_interleave(lengths_S),
        cu_seqlens=nn.functional.pad(lengths_S.cumsum(0), (1, 0)),
        **options,
    )


def even(tokens_SL: Tensor, completion_SL: Tensor) -> Tensor:
    """The reward, (S): the share of even numbers in a completion, its end not counted."""
    counted_SL = completion_SL & (tokens_SL != END)
    return (counted_SL & (tokens_SL % 2 == 0)).sum(1) / counted_SL.sum(1).clamp(min=1)


def main(steps: int = 12) -> None:
    """Trains the tiny model; torchrun starts one of this for each rank."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights on all ranks
    policy = Policy().to(device)
    shard(policy, init_device_mesh(device.type, (ranks,)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)  # made after sharding: it holds the slices
    torch.manual_seed(rank)  # other prompts and other samples on each

    for step in range(1, steps + 1):
        prompts = torch.randint(1, VOCABULARY, (PROMPTS_PER_RANK, PROMPT), device=device)
        tokens_SL, completion_SL = sample(policy, prompts.repeat_interleave(COMPLETIONS_PER_PROMPT, dim=0))
        rewards_S = even(tokens_SL, completion_SL)
        advantages_S = group_advantages(rewards_S.view(-1, COMPLETIONS_PER_PROMPT)).flatten()
        with torch.no_grad():
            old_logprobs_T = policy(tokens_SL, *pack(tokens_SL, completion_SL))
        counts = count_over_ranks(completion_SL)

        for _ in range(UPDATES_PER_ROLLOUT):
            loss, metrics = grpo_step_loss(
                policy, tokens_SL, completion_SL, old_logprobs_T, advantages_S, counts, clip_high=0.28
            )
            (loss * ranks).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        clipped = metrics["clip_low_count"] + metrics["clip_high_count"]
        sums = torch.stack(
            [loss.detach(), clipped, metrics["entropy_sum"], metrics["token_count"], rewards_S.mean() / ranks]
        )
        dist.all_reduce(sums)
        total, clipped, entropy, tokens, reward = sums.tolist()
        if rank == 0:
            print(
                f"step {step:3}  reward {reward:.4f}  loss {total:.4f}  entropy {entropy / tokens:.4f}  "
                f"clipped {clipped / tokens:.4f}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
