"""Engine: a policy in its parallel layout that samples, scores and learns. The one object an outside trainer needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from r1.engine import rollout
from r1.engine.config import parallel_config
from r1.engine.data.packing import pack_indices
from r1.engine.errors import UserError
from r1.engine.logs import every_ten_seconds
from r1.engine.sampling import Completion, SamplingParameters
from r1.engine.settings import Config, GrpoStage, OptimizerConfig
from r1.kernels import aggregation_weights
from r1.parallel import checkpoint, convert, export
from r1.parallel.config import ModelConfig
from r1.parallel.loss import IGNORED, Loss, PolicyLoss, PreferenceLoss, SupervisedLoss, TokenLogprobs, sequence_values
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import AdamConfig, Trainer
from r1.parallel.world import World, join


@dataclass
class Sample:
    """One sequence to learn from. Lists of log-probabilities have one number for each completion token.

    `tokens` is the prompt and the completion; the loss begins after `prompt_length` tokens (0: the whole text).
    """

    tokens: list[int]
    prompt_length: int = 0
    advantage: float = 0.0
    old_logprobs: list[float] = field(default_factory=list)
    reference_logprobs: list[float] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)

    @property
    def predicted(self) -> range:
        """Positions whose token the loss predicts; the first token of a text has nothing before it."""
        return range(max(1, self.prompt_length), len(self.tokens))


def stored_model(path: str | Path) -> tuple[ModelConfig, Literal["float32", "bfloat16"], bool]:
    """(model, the type to hold its weights in, whether it is a reward model) of a checkpoint or Hugging Face folder.

    CheckpointError where the path holds neither."""
    if convert.is_hugging_face(Path(path)):
        model, dtype = convert.read_config(path)
        return model, "bfloat16" if dtype in ("fp8", "bfloat16") else "float32", False
    state = checkpoint.read_state(path)
    return ModelConfig.model_validate(state["model"]), state.get("dtype", "float32"), bool(state.get("value_head"))


@dataclass
class Preference:
    """A reward model's example: a chosen and a rejected text, or one text with a label (1 good, 0 bad)."""

    chosen: list[int]
    rejected: list[int] | None = None
    label: float | None = None


class Engine:
    """Every process makes one with the same arguments and calls its methods together, with the same data.

    The world is torchrun's, or one process without it. `model` and `optimizer` stand in for those of the config
    (a student, a stage's own settings). With `train=False` there is no optimiser state. `vocab_size` is the
    tokenizer's: rows of the head above it are never sampled nor counted. Without `random_weights` they are whatever
    memory held, until `load`. Raises UserError where the layout does not
    fit the world or the model.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: ModelConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        train: bool = True,
        value_head: bool = False,
        vocab_size: int | None = None,
        seed: int | None = None,
        random_weights: bool = True,
    ) -> None:
        self.config = config
        self.model_config = model or config.model
        self.vocab_size = vocab_size or self.model_config.vocab_size
        if self.vocab_size > self.model_config.vocab_size:
            raise UserError(
                f"the tokenizer has {self.vocab_size} tokens, model.vocab_size = {self.model_config.vocab_size} is less"
            )
        self.seed = config.seed if seed is None else seed
        parallel = config.parallel
        if not self.model_config.is_moe:
            parallel = parallel.model_copy(update={"expert": 1, "expert_tensor": 1})
        settings = optimizer or config.optimizer
        adam = AdamConfig(
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            moments=settings.moments,
            offload=settings.offload,
        )
        try:
            parallel.check_model(self.model_config)
            self.world: World = join(parallel, self.seed)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.policy = Trainer(
            self.model_config,
            parallel,
            self.world,
            seed=self.seed if random_weights else None,
            adam=adam if train else None,
            value_head=value_head,
        )
        self.reference: Trainer | None = None
        # On the main process: what came with a Hugging Face checkpoint and leaves with an export.
        self.carried: dict[str, bytes] = {}
        self._writing: checkpoint.Writing | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, config: Config | None = None, **options: Any) -> Engine:
        """An engine that holds a checkpoint of ours or a Hugging Face folder, of whatever model it is.

        Without a `config` the layout is plain, in the type that the weights are stored in (FP8: bfloat16). `options`
        are Engine's. CheckpointError where the path holds neither, or it is damaged.
        """
        model, dtype, value_head = stored_model(path)
        if config is None:
            config = Config.model_construct(model=model, parallel=parallel_config(dtype=dtype))
        engine = cls(config, model=model, **{"value_head": value_head, "random_weights": False, **options})
        engine.load(path)
        return engine

    # ------------------------------------------------------------------------------------------------ reading

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParameters,
        copies: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> list[list[Completion]]:
        """`copies` completions of each prompt (token ids), the same on every process; options as rollout.generate's."""
        chosen = {**self.config.rollout.model_dump(), **options}
        if "speculate" not in options and not self.model_config.num_mtp_layers:
            chosen["speculate"] = False  # a student has no layer for it
        return rollout.generate(self.policy, prompts, sampling, copies, seed, self.vocab_size, **chosen)

    def logprobs(
        self,
        samples: Sequence[Sample],
        model: str = "policy",
        temperature: float = 1.0,
        tokens_per_micro_batch: int = 16384,
    ) -> tuple[list[list[float]], list[list[float]]]:
        """log p and entropy (nats) of every predicted token of every sample, under the policy or the reference."""
        if model not in ("policy", "reference"):
            raise ValueError(f"model = {model!r}, wanted 'policy' or 'reference'")
        trainer = self.policy
        if model == "reference":
            if self.reference is None:
                raise ValueError("there is no reference model yet: call update_reference() first")
            trainer = self.reference
        function = TokenLogprobs(self.vocab_size, temperature or 1.0)
        texts, predicted = [s.tokens for s in samples], [s.predicted for s in samples]
        rows = self._read(trainer, texts, function, tokens_per_micro_batch, predicted)
        logprobs, entropies = [], []
        for sample, (chosen, entropy) in zip(samples, rows, strict=True):
            # Row i of the model's output predicts token i + 1.
            at = range(sample.predicted.start - 1, sample.predicted.stop - 1)
            logprobs.append([chosen[i] for i in at])
            entropies.append([entropy[i] for i in at])
        return logprobs, entropies

    def values(self, texts: Sequence[list[int]], tokens_per_micro_batch: int = 16384) -> list[float]:
        """The reward model's score of each text (token ids), read at its last token."""
        if not self.policy.value_head:
            raise ValueError("values() needs an engine made with value_head=True")
        return [row[0][0] for row in self._read(self.policy, texts, _value_rows, tokens_per_micro_batch, by_text=True)]

    # ------------------------------------------------------------------------------------------------ learning

    def sft_step(
        self, samples: Sequence[Sample], *, lr: float, tokens_per_micro_batch: int = 16384
    ) -> dict[str, float]:
        """One optimiser step of next-token loss, averaged over all predicted tokens of the step (MTP as well)."""
        count = sum(len(s.predicted) for s in samples)
        if not count:
            raise UserError("a training step has no token to predict")
        weights = [1.0 / count] * len(samples)
        metrics = self._step(samples, weights, SupervisedLoss(self.vocab_size), lr, tokens_per_micro_batch)
        return {**metrics, "tokens": float(count)}

    def grpo_step(self, samples: Sequence[Sample], *, lr: float, stage: GrpoStage) -> dict[str, float]:
        """One optimiser step of GRPO (arXiv 2402.03300) over samples that carry advantages and old log-probabilities.

        Returns means over the completion tokens: ratio, kl (k3) and its k1, k2 forms, entropy, clip fractions.
        """
        lengths = torch.tensor([len(s.predicted) for s in samples])
        weights = aggregation_weights(
            lengths, aggregation=stage.aggregation, constant_length=stage.max_completion_tokens
        ).tolist()
        loss = PolicyLoss(
            self.vocab_size,
            temperature=stage.temperature,
            clip_low=stage.clip_low,
            clip_high=stage.clip_high,
            kl_coefficient=stage.kl_coefficient,
            ratio=stage.ratio,
            ratio_max=stage.ratio_max,
            importance_cap=stage.importance_cap,
        )
        metrics = self._step(samples, weights, loss, lr, stage.tokens_per_micro_batch)
        return _token_means(metrics)

    def reward_step(
        self, examples: Sequence[Preference], *, lr: float, tokens_per_micro_batch: int = 16384
    ) -> dict[str, float]:
        """One optimiser step of the reward model, averaged over the examples."""
        texts: list[list[int]] = []
        units: list[list[int]] = []
        for example in examples:
            parts = [example.chosen] if example.rejected is None else [example.chosen, example.rejected]
            units.append(list(range(len(texts), len(texts) + len(parts))))
            texts += parts
        lengths = [sum(len(texts[i]) for i in unit) for unit in units]
        plan = pack_indices(lengths, tokens_per_micro_batch, self.world.data_size)[self.world.data_rank]
        batches = []
        for chosen_units in plan:
            order = [i for u in chosen_units for i in units[u]]
            batch = self._pack([texts[i] for i in order])
            partner: list[int] = []
            label: list[float] = []
            weight: list[float] = []
            for u in chosen_units:
                example = examples[u]
                if example.rejected is not None:
                    partner += [len(partner) + 1, -1]
                    label += [-1.0, -1.0]
                    weight += [1.0 / len(examples), 0.0]
                else:
                    partner.append(-1)
                    label.append(float(example.label or 0.0))
                    weight.append(1.0 / len(examples))
            batch.sequence_fields = {
                "partner": torch.tensor(partner or [-1], device=self.world.device),
                "label": torch.tensor(label or [-1.0], device=self.world.device),
                "sequence_weights": torch.tensor(weight or [0.0], device=self.world.device),
            }
            batches.append(batch)
        metrics = self.policy.train_step(batches, PreferenceLoss(), lr)
        metrics["accuracy"] = metrics.pop("accuracy_sum") / max(1.0, metrics.pop("example_count"))
        return metrics

    def update_reference(self) -> None:
        """Make the reference model what the policy is now."""
        if self.reference is None:
            self.reference = Trainer(self.model_config, self.policy.parallel, self.world, seed=None)
        checkpoint.copy_weights(self.policy, self.reference)

    # ------------------------------------------------------------------------------------------------ keeping

    def save(
        self,
        path: str | Path,
        state: dict[str, Any] | None = None,
        optimizer: bool = True,
        *,
        keep: Path | None = None,
        background: bool = False,
    ) -> None:
        """Write weights, optimiser, reference model and `state` (JSON) to a folder; what was there stays until the
        new one is whole, and is then renamed to `keep`, where given.

        In the `background` training may go on; then `finish_save` is for everyone to call, now and then and at the
        end. CheckpointError where the folder cannot be written.
        """
        self.finish_save()
        reference = self.reference if optimizer else None
        self._writing = checkpoint.Writing(
            self.policy, path, state or {}, optimizer, reference, self.carried, keep, background
        )
        if not background:
            self.finish_save()

    def finish_save(self, wait: bool = True) -> bool:
        """Give what is saved in the background its name, waiting for it or (`wait=False`) if it is ready; whether it
        did. CheckpointError where it could not be written."""
        writing = self._writing
        if writing is None or not (wait or writing.done()):
            return False
        self._writing = None
        writing.finish()
        return True

    def load(self, path: str | Path, optimizer: bool = False) -> dict[str, Any]:
        """Read a checkpoint of any layout, or the weights of a Hugging Face folder; with `optimizer` all that training
        goes on from. Returns its state."""
        if convert.is_hugging_face(Path(path)):
            self.carried = convert.load_hf(self.policy, path, tell=every_ten_seconds("reading weights"))
            return {}
        if optimizer and checkpoint.read_state(path).get("reference"):
            if self.reference is None:
                self.reference = Trainer(self.model_config, self.policy.parallel, self.world, seed=None)
        state = checkpoint.load(self.policy, path, optimizer=optimizer, reference=self.reference if optimizer else None)
        self.carried = checkpoint.read_files(path) if self.world.is_main else {}
        return state

    def export_hf(self, path: str | Path, tokenizer: Any = None, dtype: convert.Dtype | None = None) -> None:
        """Write the policy as a Hugging Face folder that transformers and vLLM load; `dtype` None is that of the
        Hugging Face checkpoint it began as, else the model's own."""
        export.export_hf(
            self.policy, path, tokenizer, dtype=dtype, carried=self.carried, tell=every_ten_seconds("writing weights")
        )

    def close(self) -> None:
        """Let go of the models, when what is being saved is written; the process groups stay for the next engine."""
        self.finish_save()
        self.policy = None  # type: ignore[assignment]
        self.reference = None

    # ------------------------------------------------------------------------------------------------ how

    def _step(
        self, samples: Sequence[Sample], weights: Sequence[float], loss: Loss, lr: float, tokens_per_micro_batch: int
    ) -> dict[str, float]:
        if not samples:
            raise UserError("a training step has no samples")
        limit = self.model_config.max_positions
        for sample in samples:
            if len(sample.tokens) > limit:
                raise UserError(f"a sample has {len(sample.tokens)} tokens; this model takes at most {limit}")
        lengths = [len(s.tokens) for s in samples]
        plan = pack_indices(lengths, tokens_per_micro_batch, self.world.data_size)[self.world.data_rank]
        batches = [self._training_batch([(samples[i], weights[i]) for i in part], loss) for part in plan]
        return self.policy.train_step(batches, loss, lr)

    def _training_batch(self, part: list[tuple[Sample, float]], loss: Loss) -> MicroBatch:
        batch = self._pack([s.tokens for s, _ in part])
        part = part or [(Sample([0], prompt_length=1), 0.0)]
        columns: dict[str, list[float]] = {"weights": []}
        if isinstance(loss, PolicyLoss):
            columns.update({"advantages": [], "old_logprobs": []})
            if loss.kl_coefficient:
                columns["reference_logprobs"] = []
            if any(s.rollout_logprobs for s, _ in part):
                columns["rollout_logprobs"] = []
        for sample, weight in part:
            before, count = sample.predicted.start - 1, len(sample.predicted)
            after = len(sample.tokens) - before - count
            for name, column in columns.items():
                if name == "weights":
                    values = [weight] * count
                elif name == "advantages":
                    values = [sample.advantage] * count
                else:
                    values = getattr(sample, name)
                    if len(values) != count:
                        raise ValueError(f"a sample has {len(values)} {name} for {count} completion tokens")
                column += [0.0] * before + list(values) + [0.0] * after
        for name, column in columns.items():
            batch.fields[name] = torch.tensor(column, dtype=torch.float32, device=self.world.device)
        return batch

    def _pack(self, texts: Sequence[list[int]], predicted: Sequence[range] | None = None) -> MicroBatch:
        """Texts end to end, with the next token of each as its target; where `predicted` is given, other tokens are
        nobody's target. No text makes one token that counts for nothing: every replica takes part in every
        micro-batch."""
        device = self.world.device
        if not texts:
            batch = self._pack([[0]])
            batch.fields["padding"] = torch.ones(1, dtype=torch.bool, device=device)
            return batch
        tokens_T = torch.tensor([t for text in texts for t in text], dtype=torch.long, device=device)
        ends = torch.tensor([len(text) for text in texts]).cumsum(0)
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int().to(device)
        targets_T = tokens_T.roll(-1)
        targets_T[ends.to(device) - 1] = 0
        if predicted is not None:
            wanted = [i + 1 in span for text, span in zip(texts, predicted) for i in range(len(text))]
            targets_T[~torch.tensor(wanted, device=device)] = IGNORED
        return MicroBatch(tokens_T, cu_seqlens, {"targets": targets_T})

    def _read(
        self,
        trainer: Trainer,
        texts: Sequence[list[int]],
        function: Callable[..., Tensor],
        tokens_per_micro_batch: int,
        predicted: Sequence[range] | None = None,
        by_text: bool = False,
    ) -> list[tuple[list[float], ...]]:
        """`function`'s columns for every text: of its tokens, or (`by_text`) of the text as a whole."""
        plan = pack_indices([len(t) for t in texts], tokens_per_micro_batch, self.world.data_size)[self.world.data_rank]
        batches = [
            self._pack([texts[i] for i in part], [predicted[i] for i in part] if predicted else None) for part in plan
        ]
        outputs = trainer.read(batches, function)
        mine: dict[int, tuple[list[float], ...]] = {}
        for part, output in zip(plan, outputs, strict=True):
            columns = output.float().reshape(output.shape[0], -1).T.tolist()
            start = 0
            for place, index in enumerate(part):
                length = 1 if by_text else len(texts[index])
                begin = place if by_text else start
                mine[index] = tuple(column[begin : begin + length] for column in columns)
                start += length
        group = self.world.groups.dp
        if group.size() > 1:
            parts: list[dict[int, tuple[list[float], ...]]] = [{} for _ in range(group.size())]
            dist.all_gather_object(parts, mine, group=group)
            mine = {i: row for gathered in parts for i, row in gathered.items()}
        return [mine[i] for i in range(len(texts))]


def _value_rows(model: Any, hidden: list[Tensor], batch: MicroBatch, packed: Any) -> Tensor:
    return sequence_values(model, hidden, batch, packed)


def _token_means(metrics: dict[str, float]) -> dict[str, float]:
    """Sums over tokens become means: X_sum → X, X_count → X_fraction."""
    count = max(1.0, metrics.get("token_count", 1.0))
    result: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "token_count":
            result["tokens"] = value
        elif name.endswith("_sum"):
            result[name.removesuffix("_sum")] = value / count
        elif name.endswith("_count"):
            result[name.removesuffix("_count") + "_fraction"] = value / count
        else:
            result[name] = value
    if "kl_k3" in result:
        result["kl"] = result["kl_k3"]
    if not all(math.isfinite(v) for v in result.values()):
        bad = next(name for name, v in result.items() if not math.isfinite(v))
        raise RuntimeError(f"{bad} is {result[bad]} after this step")
    return result


__all__ = ["Completion", "Engine", "Preference", "Sample", "SamplingParameters"]
