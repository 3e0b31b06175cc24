"""Time of a step, by formulas: products at the rate their kernels reach, other kernels by the bytes they move,
collectives by the slowest link they cross, the pipeline's bubble; and the rollout of an RL step. Predictions, all of
them: hardware.toml says what they rest on."""

from __future__ import annotations

from dataclasses import dataclass

from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.planner.hardware import Device, Hardware
from r1.parallel.planner.memory import BYTES, Step, is_moe, layer_bytes, layer_counts, stage_counts


@dataclass(frozen=True)
class Work:
    """Seconds of one micro-batch on one GPU, forward and backward, before the loss that whole steps have."""

    compute: float = 0.0
    memory: float = 0.0  # kernels that are no products
    tensor: float = 0.0  # sequence- and tensor-parallel collectives
    context: float = 0.0
    exchange: float = 0.0  # of rows among experts, what no computation hides

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    compute: float
    memory: float
    tensor: float
    context: float
    exchange: float
    bubble: float
    data: float  # gradients and weights of the replicas
    optimizer: float
    flops: float  # of one token, forward and backward, without recomputation

    @property
    def total(self) -> float:
        return (
            self.compute + self.memory + self.tensor + self.context + self.exchange + self.bubble + self.data
            + self.optimizer
        )  # fmt: skip


def flops_per_token(model: ModelConfig, sequence_length: int, mtp: bool, forward: bool = False) -> float:
    """Of a causal sequence, whole model; a backward is twice a forward. Model FLOPs: nothing that is recomputed."""
    one = ParallelConfig()
    layers = [is_moe(model, i) for i in range(model.num_layers)] + [model.is_moe] * (model.num_mtp_layers if mtp else 0)
    total = 0.0
    for moe in layers:
        counts = layer_counts(model, one, moe)
        active = counts.dense
        if moe:
            active += counts.experts * model.experts_per_token / model.num_experts
        total += 2 * active + _attention(model) * (sequence_length + 1) / 2
    heads = 1 + (model.num_mtp_layers if mtp else 0)
    total += 2 * heads * model.vocab_size * model.hidden_size
    total += 2 * (heads - 1) * 2 * model.hidden_size**2
    return total if forward else 3 * total


def _attention(model: ModelConfig) -> float:
    """FLOPs of the core for one query and key."""
    v = model.v_head_dim if model.architecture == "deepseek_v3" else model.qk_head_dim
    return 2 * model.num_heads * (model.qk_head_dim + v)


def _layer(
    model: ModelConfig, parallel: ParallelConfig, step: Step, moe: bool, hw: Hardware, device: Device,
    hidden_exchange: bool,
) -> Work:  # fmt: skip
    m, p, k = model, parallel, hw.kernels
    b, H = BYTES[p.dtype], m.hidden_size
    T = step.tokens_per_micro_batch / p.context
    t = T / p.tensor if p.sequence else T
    fp8 = p.fp8 != "off"
    peak = device.fp8_flops if fp8 else device.bf16_flops
    gemm = k.fp8_gemm if fp8 else k.bf16_gemm
    grouped = k.fp8_grouped_gemm if fp8 else k.bf16_grouped_gemm
    wgrad = k.fp8_wgrad if fp8 else None
    counts = layer_counts(m, p, moe)
    router = m.num_experts * H if moe else 0
    # A backward is one product for the input's gradient and one for the weight's.
    again = 1 if p.recompute == "full" else 0
    dense = 2 * T * (counts.dense - router)  # replicated down projections run on t tokens each: of little weight
    compute = dense / peak * ((2 + again) / gemm + 1 / (wgrad or gemm)) + 6 * t * router / device.bf16_flops / 0.3
    if p.recompute == "selective" and m.architecture == "deepseek_v3":
        up = (
            m.num_heads
            // p.tensor
            * (m.q_lora_rank * m.qk_head_dim + m.kv_lora_rank * (m.qk_nope_head_dim + m.v_head_dim))
        )
        compute += 2 * T * up / peak / gemm
    if moe:
        rows = t * m.experts_per_token * p.expert_tensor
        experts = 2 * rows * 3 * H * m.expert_hidden_size / p.expert_tensor
        compute += experts / peak * ((2 + again) / grouped + 1 / (wgrad or grouped))
    core = _attention(m) / p.tensor * T * (step.sequence_length + 1) / 2 / device.bf16_flops
    compute += core * ((1 + again) / k.attention_forward + 2.5 / k.attention_backward)

    plain = p.model_copy(update={"recompute": "none"})
    kept = layer_bytes(m, plain, step.tokens_per_micro_batch, moe).kept
    memory = kept * k.traffic_per_kept_byte / device.memory_bandwidth / k.memory

    # Two gathers and two scatters forward, twice that in the backward, where a gather is done again for the weights.
    tensor = 0.0
    if p.tensor > 1:
        link = device.nvlink_bandwidth if p.tensor <= device.gpus_per_node else device.network_bandwidth
        calls = 4 + 6 + (4 if again else 0)
        tensor = calls * b * T * H * (p.tensor - 1) / p.tensor / link / k.network
    context = 0.0
    if p.context > 1:
        spans = p.tensor * p.context
        link = device.nvlink_bandwidth if spans <= device.gpus_per_node else device.network_bandwidth
        width = m.cached_width(1)
        context = (2 + again) * b * step.tokens_per_micro_batch * width * (p.context - 1) / p.context / link / k.network
    exchange = exchange_seconds(m, p, t, hw, device) * (4 + 2 * again) if moe else 0.0
    if hidden_exchange or p.overlap_expert_exchange:
        exchange = max(0.0, exchange - 0.9 * (compute + memory))
    elif moe and p.overlap_shared_experts:
        shared = 2 * T * 3 * H * m.num_shared_experts * m.expert_hidden_size / p.tensor / peak / gemm
        exchange = max(0.0, exchange - (1 + again) * shared)  # of the forward alone
    return Work(compute, memory, tensor, context, exchange)


def exchange_seconds(
    model: ModelConfig, parallel: ParallelConfig, tokens: float, hw: Hardware, device: Device
) -> float:
    """One way of `tokens` tokens' rows to the experts that they chose, or back."""
    m, p = model, parallel
    if p.expert == 1:
        return 0.0
    b, H = BYTES[p.dtype], m.hidden_size
    nodes = -(-p.expert * p.expert_tensor // device.gpus_per_node)
    rows = tokens * m.experts_per_token
    inside = b * rows * H * (p.expert - 1) / p.expert / device.nvlink_bandwidth
    if nodes == 1:
        return inside / hw.kernels.network
    if p.dispatcher == "flex":
        # DeepEP sends a token to a node once; the router chooses among few groups of experts, each of them on a node.
        reach = min(nodes * m.groups_per_token / m.num_expert_groups, m.experts_per_token, nodes)
    else:
        reach = m.experts_per_token
    outside = b * tokens * reach * H * (nodes - 1) / nodes / device.network_bandwidth
    return max(outside, inside) / hw.kernels.network


def step_time(
    model: ModelConfig, parallel: ParallelConfig, step: Step, world_size: int, hw: Hardware, device: Device,
    moments_bytes: int = 8, offload: bool = False, hidden_exchange: bool = False,
) -> StepTime:  # fmt: skip
    """One optimiser step of training. The slowest pipeline rank sets the pace.

    `hidden_exchange` is for schedules that r1 does not have, as DualPipe: as with `overlap_expert_exchange`, the
    computation of one micro-batch hides the exchange of another's tokens among experts, as far as it lasts.
    """
    m, p = model, parallel
    b, k = BYTES[p.dtype], hw.kernels
    data = p.data(world_size)
    T = step.tokens_per_micro_batch / p.context
    layer, ranks = 0, [Work()] * p.pipeline
    kinds = {
        moe: _layer(m, p, step, moe, hw, device, hidden_exchange) for moe in {is_moe(m, i) for i in range(m.num_layers)}
    }
    for number, letters in enumerate(p.stages(m)):
        work = Work()
        for letter in letters:
            if letter == "t":
                work, layer = work + kinds[is_moe(m, layer)], layer + 1
            elif letter == "m" and step.uses_mtp:
                work += kinds[m.is_moe]
                work += _head(m, p, T, hw, device)
            elif letter == "L" and not step.value_head:
                work += _head(m, p, T, hw, device)
        ranks[number % p.pipeline] += work
    slowest = max(ranks, key=lambda w: w.total)
    lost = 1 / hw.run.step
    M = step.micro_batches
    bubble = slowest.total * (p.pipeline - 1) / p.virtual_pipeline
    expert_data = world_size // (p.pipeline * p.expert * p.expert_tensor)
    replicas = data * p.context
    sync = optimizer = 0.0
    of_stages = stage_counts(m, p, step.value_head)
    for rank in range(p.pipeline):
        counts = of_stages[rank :: p.pipeline]
        dense, experts = sum(c.dense for c in counts), sum(c.experts for c in counts)
        sent = sum(n * (ways - 1) / ways for n, ways in ((dense, replicas), (experts, expert_data)))
        # Replicas are far apart.
        sync = max(sync, (4 + b) * sent / device.network_bandwidth / k.network)
        updated = dense / replicas + experts / expert_data
        moved = updated * (2 * moments_bytes + 4 + 8 + b) + 2 * 4 * (dense + experts)  # the norm; clearing gradients
        seconds = moved / device.memory_bandwidth / k.memory
        seconds += 2 * updated * (moments_bytes + 4) / device.pcie_bandwidth if offload else 0.0
        optimizer = max(optimizer, seconds)
    if p.overlap_grad_reduce:
        sync *= 0.3
    return StepTime(
        **{name: M * value * lost for name, value in vars(slowest).items()},
        bubble=bubble * lost,
        data=sync,
        optimizer=optimizer,
        flops=flops_per_token(m, step.sequence_length, step.uses_mtp),
    )


def _head(model: ModelConfig, parallel: ParallelConfig, T: float, hw: Hardware, device: Device) -> Work:
    """Logits forward, again in the backward, and two gradients: in bf16."""
    flops = 2 * T * model.hidden_size * model.vocab_size / parallel.tensor
    return Work(compute=4 * flops / device.bf16_flops / hw.kernels.bf16_gemm)


def read_time(
    model: ModelConfig, parallel: ParallelConfig, step: Step, world_size: int, hw: Hardware, device: Device
) -> float:
    """Seconds of the same tokens forward alone, as log-probabilities of a frozen model are read: about a third."""
    whole = step_time(model, parallel, step, world_size, hw, device)
    again = 1 if parallel.recompute == "full" else 0
    return (whole.total - whole.data - whole.optimizer) / (3 + again)


# ------------------------------------------------------------------------------------------------------------ rollout


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of sampling for one optimiser step: until the mean completion has ended, while all run; then `longest`,
    for the rest of the longest one, whose tokens come one after another; the prompts; and FP8 copies to make again."""

    together: float
    longest: float
    prefill: float
    sync: float

    @property
    def total(self) -> float:
        return self.together + self.longest + self.prefill + self.sync


def rollout_time(
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    hw: Hardware,
    device: Device,
    *,
    completions: float,
    prompt_tokens: float,
    mean_tokens: float,
    longest_tokens: float,
    steps_per_rollout: int,
    max_sequences: int,
    speculate: bool,
) -> RolloutTime:
    """`completions` of `mean_tokens` tokens on average, for one step; a rollout serves `steps_per_rollout` steps, which
    share the wait for its longest completion. All the world's GPUs decode, split as in training."""
    m, p = model, parallel
    b = BYTES[p.dtype]
    replicas = p.data(world_size) * p.context
    own = completions * steps_per_rollout / replicas
    at_once = min(own, max_sequences)
    waves = own / at_once
    one = ParallelConfig(tensor=p.tensor, expert=p.expert, expert_tensor=p.expert_tensor)
    counts = [layer_counts(m, one, is_moe(m, i)) for i in range(m.num_layers)]
    size = 1 if p.fp8 != "off" else b
    # Every weight is read for a step of decoding; and the cache of every running sequence, half grown.
    weights = size * sum(c.dense + c.experts for c in counts) + b * m.vocab_size * m.hidden_size / p.tensor
    cache = at_once * (prompt_tokens + mean_tokens / 2) * b * m.num_layers * m.cached_width(p.tensor)
    moes = sum(is_moe(m, i) for i in range(m.num_layers))
    latency = m.num_layers * hw.run.launch_latency
    if p.expert > 1:
        latency += 2 * moes * hw.run.exchange_latency
    read = device.memory_bandwidth * hw.kernels.memory
    tokens_a_step = 1 + (hw.run.draft_acceptance if speculate and m.num_mtp_layers else 0)
    # The stages work one after another on a step, so that its time is the sum of theirs.
    peak = device.fp8_flops * hw.kernels.fp8_gemm if p.fp8 != "off" else device.bf16_flops * hw.kernels.bf16_gemm
    compute = at_once * flops_per_token(m, prompt_tokens + mean_tokens, False, forward=True) / p.tensor / peak
    alone = (weights / read + latency) / tokens_a_step
    full = max((weights + cache) / read, compute) + latency + 2 * moes * exchange_seconds(m, p, at_once, hw, device)
    together = waves * full / tokens_a_step * mean_tokens / steps_per_rollout
    longest = alone * max(0.0, longest_tokens - mean_tokens) / steps_per_rollout
    flops = flops_per_token(m, prompt_tokens, False, forward=True) * completions * prompt_tokens
    prefill = flops / world_size / (device.bf16_flops * hw.kernels.bf16_gemm * hw.run.step)
    # Weights are shared with the trainer: nothing to send but the FP8 copies to make again.
    sync = (3 * weights / p.pipeline / read if p.fp8 != "off" else 0.0) / steps_per_rollout
    return RolloutTime(together, longest, prefill, sync)
