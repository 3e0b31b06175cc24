"""The reward model: a scalar head on the architecture. Helpfulness is learned from pairs of final answers (Bradley and
Terry), safety from whole responses with a label. Ranks held-out pairs to say how good it is."""

from __future__ import annotations

from collections.abc import Sequence

from r1.engine.data.documents import preference_pairs, safety_examples
from r1.engine.data.tasks import Prompt, prompt_tokens
from r1.engine.data.tokenizer import Tokenizer
from r1.engine.engine import Engine, Preference
from r1.engine.errors import UserError
from r1.engine.logs import StageProgress
from r1.engine.prompts import Deck, answerable, everyday_prompts
from r1.engine.settings import Config
from r1.engine.stage import StageRun, load_tokenizer, seed_of


def run(config: Config) -> None:
    stage = StageRun(config, "reward_model")
    if stage.complete:
        return
    settings = stage.settings
    tokenizer = load_tokenizer(config)
    examples = training_examples(config, tokenizer)
    engine, state = stage.start(settings.from_, value_head=True, tokenizer=tokenizer)
    size = min(settings.pairs_per_step, len(examples))
    steps = max(1, len(examples) * settings.epochs // size)
    deck = Deck(len(examples), seed_of(config, stage.name, "order"))
    with StageProgress(stage.title, steps, int(state["step"])) as progress:
        for step in range(int(state["step"]), steps):
            batch, now = [examples[i] for i in deck.deal(step * size, size)], settings.at_step(step)
            lr = now.optimizer.lr_at(step, steps)
            with stage.timer.phase("train"):
                metrics = engine.reward_step(batch, lr=lr, tokens_per_micro_batch=now.tokens_per_micro_batch)
            stage.record(step, {**metrics, "lr": lr})
            progress.update(step + 1, {"loss": metrics["loss"], "accuracy": metrics["accuracy"]})
            stage.save(engine, step + 1)
    stage.save(engine, steps, force=True)
    stage.write("evaluation.json", {"heldout_accuracy": ranking_accuracy(stage, engine, tokenizer)})
    engine.close()
    stage.finish("checkpoint", "evaluation.json")


def judged_tokens(tokenizer: Tokenizer, prompt: Prompt, text: str) -> list[int]:
    """What the model reads of a response: the prompt, the text to judge, eos."""
    return [*prompt_tokens(tokenizer, prompt), *tokenizer.encode(text), tokenizer.eos_id or 0]


def training_examples(config: Config, tokenizer: Tokenizer) -> list[Preference]:
    """Pairs of final answers, and whole responses with their safety; lengths of a pair are alike by construction."""
    settings = config.stages.reward_model
    asked = answerable(everyday_prompts(config, kind="general"), "reward_model: general prompts to train on")
    wishes = everyday_prompts(config, count=max(1, len(asked) // 3), kind="safety")
    seed = seed_of(config, "reward_model", "examples")
    pairs = preference_pairs([asked[i] for i in Deck(len(asked), seed).deal(0, settings.pairs)], seed)
    mixed = wishes + asked[: len(wishes)]
    labelled = safety_examples([mixed[i] for i in Deck(len(mixed), seed).deal(0, settings.safety_examples)], seed)
    examples = [
        Preference(judged_tokens(tokenizer, p, chosen), judged_tokens(tokenizer, p, rejected))
        for p, chosen, rejected in pairs
    ]
    examples += [Preference(judged_tokens(tokenizer, p, text), label=float(safe)) for p, text, safe in labelled]
    longest = settings.max_tokens
    kept = [e for e in examples if max(len(e.chosen), len(e.rejected or [])) <= longest]
    if not kept:
        raise UserError(f"reward_model: all {len(examples)} examples are longer than max_tokens = {longest}")
    return kept


def ranking_accuracy(stage: StageRun, engine: Engine, tokenizer: Tokenizer) -> float:
    """The share of held-out pairs whose chosen answer scores higher."""
    config, settings = stage.config, stage.settings
    prompts = everyday_prompts(config, "eval", count=settings.heldout_pairs, kind="general")
    prompts = answerable(prompts, "reward_model: held-out general prompts")
    pairs = preference_pairs(prompts, seed_of(config, stage.name, "heldout"))
    texts = [judged_tokens(tokenizer, p, text) for p, chosen, rejected in pairs for text in (chosen, rejected)]
    with stage.timer.phase("evaluate"):
        scores: Sequence[float] = engine.values(texts, settings.tokens_per_micro_batch)
    return sum(scores[2 * i] > scores[2 * i + 1] for i in range(len(pairs))) / len(pairs)
