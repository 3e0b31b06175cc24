"""Memory of one GPU of each pipeline rank, by formulas over shapes; r1.parallel.dry_run counts the same from tensors.

Letters in the formulas: T tokens of a micro-batch on a context-parallel rank, t those of a sequence-parallel rank, P
rows that a rank's experts take. With equal loads, P = t x experts_per_token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from r1.kernels.grpo import LOGITS_ON_GPU, MIN_SPAN
from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.model import DTYPES
from r1.parallel.planner.schedule import order
from r1.parallel.trainer import AdamConfig

BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
QUANTIZED = 1 + 4 / 128  # bytes of a number in FP8 with one float32 scale for 128


@dataclass(frozen=True)
class Step:
    """What one optimiser step of one replica works on. Lengths in tokens."""

    tokens_per_micro_batch: int
    sequence_length: int
    micro_batches: int
    value_head: bool = False
    uses_mtp: bool = False


@dataclass(frozen=True)
class Counts:
    """Parameters of one rank: dense ones (all replicas of a tensor-parallel rank have the same), and experts'."""

    dense: int = 0
    experts: int = 0
    quantized: int = 0  # those of both that are in matrix products of FP8
    biases: int = 0  # of routers, float32, not trained

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline rank. `working` is what a layer's forward or backward needs for a moment, and
    `logits` how much more than that the loss needs."""

    parameters: float
    gradients: float
    optimizer: float
    quantized: float
    activations: float
    working: float
    logits: float
    host: float  # per GPU, in the node's memory

    @property
    def moving(self) -> float:
        """All that comes and goes within a step."""
        return self.activations + self.working + self.logits

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.quantized + self.moving


def layer_counts(model: ModelConfig, parallel: ParallelConfig, moe: bool) -> Counts:
    """One decoder layer on one rank."""
    m, tp, H = model, parallel.tensor, model.hidden_size
    if m.architecture == "deepseek_v3":
        q_from = m.q_lora_rank or H
        whole = (H * m.q_lora_rank if m.q_lora_rank else 0) + H * (m.kv_lora_rank + m.qk_rope_head_dim)
        split = m.num_heads * (
            q_from * m.qk_head_dim + m.kv_lora_rank * (m.qk_nope_head_dim + m.v_head_dim) + m.v_head_dim * H
        )
        norms = m.q_lora_rank + m.kv_lora_rank
        linear = whole + split // tp
    else:
        width = m.num_heads + 2 * m.kv_heads
        linear = (H * width + m.num_heads * H) * m.qk_head_dim // tp
        norms = width * m.qk_head_dim // tp if m.architecture == "qwen2" else 0  # biases, in fact
    norms += 2 * H
    if not moe:
        linear += 3 * H * m.ffn_hidden_size // tp
        return Counts(linear + norms, 0, linear)
    linear += 3 * H * m.num_shared_experts * m.expert_hidden_size // tp
    experts = m.num_experts // parallel.expert * 3 * H * m.expert_hidden_size // parallel.expert_tensor
    return Counts(linear + norms + m.num_experts * H, experts, linear + experts, m.num_experts)


def is_moe(model: ModelConfig, layer: int) -> bool:
    return model.is_moe and layer >= model.num_dense_layers


def stage_counts(
    model: ModelConfig, parallel: ParallelConfig, value_head: bool = False, mtp_runs: bool = True
) -> list[Counts]:
    """Of each stage (model chunk), in the order of the layers. Weights are quantised when they are first multiplied by:
    those of an MTP layer that does not run never are."""
    stages, layer, result = parallel.stages(model), 0, []
    H, table = model.hidden_size, model.vocab_size * model.hidden_size // parallel.tensor
    mtp = model.num_mtp_layers and not value_head
    for number, letters in enumerate(stages):
        total = Counts(table) if "E" in letters else Counts()
        for letter in letters:
            if letter == "t":
                total += layer_counts(model, parallel, is_moe(model, layer))
                layer += 1
                if layer == model.num_layers:
                    total += Counts(H)  # the last norm
            elif letter == "m" and mtp:
                own = Counts(2 * H * H // parallel.tensor + 3 * H)
                of = layer_counts(model, parallel, model.is_moe)
                total += (of if mtp_runs else replace(of, quantized=0)) + own
        if "L" in letters:
            tied = model.tie_embeddings and not value_head
            # MTP reads the embedding, and a tied head is one: the last stage has a copy.
            copy = table if number > 0 and (mtp or tied) else 0
            total += Counts(copy + (H if value_head else 0 if tied else table))
        result.append(total)
    return result


# ------------------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Layer:
    """Bytes of one decoder layer and micro-batch: kept for the backward, what a forward needs beside that for a
    moment, and what a backward does."""

    kept: float
    forward: float
    backward: float


def attention_bytes(model: ModelConfig, parallel: ParallelConfig, tokens: int) -> float:
    m, b, tp = model, BYTES[parallel.dtype], parallel.tensor
    T, S = tokens // parallel.context, tokens
    t = T // tp if parallel.sequence else T
    fp8, selective = parallel.fp8 == "block", parallel.recompute == "selective"
    N = m.num_heads // tp
    gathers = parallel.sequence and tp > 1
    kept = 4 * T * N  # log-sum-exp
    kept += b * t * m.hidden_size if not (selective or fp8) else 0  # the norm's result
    if m.architecture != "deepseek_v3":
        kept += b * T * N * m.qk_head_dim * 2 + b * S * 2 * (m.kv_heads // tp) * m.qk_head_dim
        if fp8:
            kept += QUANTIZED * (T * m.hidden_size + T * N * m.qk_head_dim)
        return kept
    latent = m.kv_lora_rank + m.qk_rope_head_dim
    kept += b * t * (m.q_lora_rank + latent) + b * S * m.qk_rope_head_dim
    kept += b * T * N * m.v_head_dim  # the result
    expanded = N * (T * m.qk_head_dim + S * (m.qk_nope_head_dim + m.v_head_dim))
    if selective:
        kept += b * t * m.kv_lora_rank
    else:
        kept += b * expanded
        kept += (
            QUANTIZED * (T * m.q_lora_rank + S * m.kv_lora_rank)
            if fp8
            else b * (t * m.q_lora_rank + (S if parallel.context > 1 else t) * m.kv_lora_rank)
        )
    if fp8:
        copies = 2 if gathers or selective else 1  # of what both down projections read
        kept += QUANTIZED * (copies * t * m.hidden_size + T * N * m.v_head_dim)
    return kept


def layer_bytes(model: ModelConfig, parallel: ParallelConfig, tokens: int, moe: bool) -> Layer:
    """Of `tokens` in a micro-batch of the replica."""
    m, b, tp = model, BYTES[parallel.dtype], parallel.tensor
    T = tokens // parallel.context
    t = T // tp if parallel.sequence else T
    H = m.hidden_size
    fp8, selective = parallel.fp8 == "block", parallel.recompute == "selective"
    kept = attention_bytes(m, parallel, tokens) + 2 * b * t * H  # and the two residual sums
    norm = 0 if selective or fp8 else b * t * H
    if not moe:
        F = m.ffn_hidden_size // tp
        middle = 0 if selective else b * T * 2 * F + (QUANTIZED if fp8 else b) * T * F
        kept += middle + norm + (QUANTIZED * T * H if fp8 and not selective else 0)
        forward = b * T * F
        # Of the two products' inputs, or of the second's input and, gathered, of the output.
        backward = max(b * T * 2 * F, b * T * (H + F) if t != T else 0)
        if selective:
            backward += b * T * 3 * F + b * T * H
    else:
        K, F, W = m.experts_per_token, m.expert_hidden_size // parallel.expert_tensor, m.num_shared_experts
        shared = W * m.expert_hidden_size // tp
        P = t * K * parallel.expert_tensor
        local = parallel.expert == 1 and parallel.expert_tensor == 1
        kept += norm + b * T * 2 * shared + (QUANTIZED if fp8 else b) * T * shared
        kept += b * t * H if fp8 and not selective else 0  # what the router reads, else kept by the shared experts
        kept += 4 * t * m.num_experts * (1 if local else 3) + (0 if local else 2 * t * m.num_experts)
        kept += b * P * 2 * F + 8 * t * K * (1 if local else 4)
        if fp8:
            kept += QUANTIZED * (T * H + P * H + P * F)
        elif not local:
            kept += b * P * H
        weights = b * (m.num_experts // parallel.expert) * 3 * H * F
        # Rows on their way out and back: sorted, exchanged, computed, sorted again.
        forward = (5 if fp8 else 4) * b * P * H
        backward = 2 * b * P * H + weights + 4 * b * t * H
        if not fp8:
            backward = max(backward, 3 * b * P * H + 4 * b * P * F)  # with all that lies between the two products
        if parallel.overlap_expert_exchange:  # two micro-batches are on their way
            forward, backward = forward + 2 * b * P * H, backward + 2 * b * P * H
            kept += b * t * H  # Megatron's pieces hand each other the shared experts' result
    if parallel.recompute == "full":
        # Of the layer's input and output, gradients among them.
        beside = (-1 if fp8 else 3) if moe else -2
        backward, kept = max(forward, backward) + kept + beside * b * t * H, b * t * H
    elif selective and m.architecture == "deepseek_v3":
        expanded = m.num_heads // tp * (T * m.qk_head_dim + tokens * (m.qk_nope_head_dim + m.v_head_dim))
        backward = max(backward, 3 * b * expanded)
    return Layer(kept, forward, backward)


@dataclass(frozen=True)
class Chunk:
    """Bytes of one stage: kept of one micro-batch, kept once, and what a layer or the loss needs for a moment."""

    kept: float
    once: float
    working: float
    loss: float


def stage_activations(model: ModelConfig, parallel: ParallelConfig, step: Step) -> list[Chunk]:
    """Of each stage, in the order of the layers."""
    b, H = BYTES[parallel.dtype], model.hidden_size
    T = step.tokens_per_micro_batch // parallel.context
    t = T // parallel.tensor if parallel.sequence else T
    stages, layer, result = parallel.stages(model), 0, []
    for number, letters in enumerate(stages):
        kept = working = float(b * t * H)  # what came in
        once = loss = 0.0
        for letter in letters:
            runs = letter == "t" or (letter == "m" and step.uses_mtp)
            if not runs:
                continue
            moe = is_moe(model, layer) if letter == "t" else model.is_moe
            of = layer_bytes(model, parallel, step.tokens_per_micro_batch, moe)
            layer += letter == "t"
            kept += of.kept
            working = max(working, of.forward, of.backward)
            if letter == "m":
                # Its input and what it embeds, gathered; in FP8 the norm of both.
                full = (3 if parallel.fp8 == "block" else 2) * t + (T if t != T else 0)
                kept += b * H * (full if parallel.recompute == "full" else 8 * t) + _head_kept(model, parallel, T, t)
            elif layer == model.num_layers:
                kept += b * t * H  # the last norm
        if "L" in letters:
            head = _head_kept(model, parallel, T, t)
            kept += head
            if not step.uses_mtp:
                working = max(0.0, working - head)  # which is gone when the layers' turn comes
            if step.value_head:
                loss = 4 * T * H + 2 * b * t * H  # the hidden states in float32, and gradients
            else:
                rows = model.vocab_size // parallel.tensor
                logits = 4 * rows * min(T, max(LOGITS_ON_GPU, MIN_SPAN * T) // rows)
                # Gradients of the head's weight; MTP's second use of it, and of the embedding, wait to be added up.
                # One that is the embedding too is held back to the end.
                tables = 3 if step.uses_mtp and model.num_mtp_layers else 1
                if model.tie_embeddings:
                    working += b * rows * H
                loss = max(tables * b * rows * H, b * rows * H + b * T * H + logits)
        if number + 1 < len(stages):
            once += b * t * H  # a gradient that came back
        if number > 0:
            working, loss = working + b * t * H, loss + b * t * H  # the next micro-batch's input
        if parallel.tensor > 1 and parallel.sequence and parallel.fp8 != "block":
            once += b * T * H  # Megatron's buffer for what its linears gather
        result.append(Chunk(kept, once, working, loss))
    return result


def _head_kept(model: ModelConfig, parallel: ParallelConfig, T: int, t: int) -> float:
    """What a loss keeps: hidden states, gathered from the tensor-parallel ranks, and the logits where they are few."""
    rows = model.vocab_size // parallel.tensor
    logits = 4 * T * rows if T <= max(LOGITS_ON_GPU, MIN_SPAN * T) // rows else 0
    return (BYTES[parallel.dtype] * T * model.hidden_size if t != T else 0) + 24 * T + logits


def in_flight(parallel: ParallelConfig, rank: int, micro_batches: int, sizes: list[float]) -> float:
    """Most bytes that wait for a backward on a pipeline rank whose chunks keep `sizes` for a micro-batch, under
    Megatron's 1F1B and interleaved 1F1B schedules."""
    live = most = 0.0
    combined = parallel.overlap_expert_exchange
    for forward, _, chunk in order(parallel.pipeline, parallel.virtual_pipeline, rank, micro_batches, combined):
        live += sizes[chunk] if forward else -sizes[chunk]
        most = max(most, live)
    return most


# ------------------------------------------------------------------------------------------------------------- a rank


def memory(model: ModelConfig, parallel: ParallelConfig, adam: AdamConfig, step: Step, world_size: int) -> list[Memory]:
    """One GPU of each pipeline rank, in a training step. ValueError where the layout does not fit the world."""
    data = parallel.data(world_size)
    if step.value_head:
        model = model.model_copy(update={"num_mtp_layers": 0, "tie_embeddings": False})
    b, p = BYTES[parallel.dtype], parallel.pipeline
    counts = stage_counts(model, parallel, step.value_head, step.uses_mtp)
    activations = stage_activations(model, parallel, step)
    expert_data = world_size // (p * parallel.expert * parallel.expert_tensor)
    master = 4 if parallel.dtype == "bfloat16" else 0
    state = master + 2 * BYTES[adam.moments]
    result = []
    for rank in range(p):
        own = sum(counts[rank::p], Counts())
        chunks = activations[rank::p]
        waiting = in_flight(parallel, rank, step.micro_batches, [c.kept for c in chunks])
        waiting += max(c.once for c in chunks)
        working = max(c.working for c in chunks)
        loss = max(c.loss for c in chunks)
        optimizer = state * (own.dense / (data * parallel.context) + own.experts / expert_data)
        if adam.offload:  # it comes back for the step, when there are no activations
            working = max(working, optimizer - waiting)
        result.append(
            Memory(
                parameters=b * (own.dense + own.experts) + 8 * own.biases,
                gradients=4 * (own.dense + own.experts),
                optimizer=0.0 if adam.offload else optimizer,
                quantized=2 * own.quantized if parallel.fp8 == "block" else 0.0,
                activations=waiting,
                working=working,
                logits=max(0.0, loss - working),
                host=optimizer if adam.offload else 0.0,
            )
        )
    return result
