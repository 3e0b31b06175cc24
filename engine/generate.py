"""`r1 generate CHECKPOINT "…"`: lets a person try a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1.engine.errors import UserError

if TYPE_CHECKING:
    from r1.engine.data.tokenizer import Tokenizer
    from r1.engine.engine import Engine


def generate_text(
    checkpoint: str | Path,
    prompt: str,
    *,
    temperature: float,
    top_p: float,
    top_k: int | None,
    min_p: float,
    max_tokens: int | None,
    seed: int,
) -> str:
    """One completion of `prompt`, put into the template that the model was trained with.

    `checkpoint` is a checkpoint's folder or a stage's; the tokenizer lies beside it or above. `max_tokens` without a
    value is what the model has room for. Raises UserError where either is missing or damaged.
    """
    folder = find_checkpoint(checkpoint)  # first, as the imports take seconds
    from r1.engine.data.tasks import Prompt, prompt_tokens
    from r1.engine.engine import SamplingParameters

    engine, tokenizer = open_checkpoint(folder, seed=seed)
    tokens = prompt_tokens(tokenizer, Prompt(id="user", task="user", text=prompt))
    room = engine.model_config.max_positions - len(tokens)
    if room < 1:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, the model takes {engine.model_config.max_positions} in all"
        )
    stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    try:
        sampling = SamplingParameters(min(max_tokens or room, room), temperature, top_p, stops, top_k, min_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    completion = engine.generate([tokens], sampling, seed=seed)[0][0]
    ids = completion.tokens[:-1] if completion.finished else completion.tokens
    return tokenizer.decode(ids)


def open_checkpoint(folder: Path, *, settings: Sequence[str] = (), seed: int = 0) -> tuple[Engine, Tokenizer]:
    """The model of a checkpoint's folder, ready to generate, and the tokenizer beside it or above.

    `settings` are of the table `parallel` ("parallel.tensor=2"). Raises UserError where the folder holds no language
    model, there is no tokenizer, or the layout does not fit.
    """
    from r1.engine.config import Config, parallel_config
    from r1.engine.data.tokenizer import Tokenizer
    from r1.engine.engine import Engine, stored_model

    parallel_config(settings)  # a mistake in them is told first
    model, dtype, value_head = stored_model(folder)
    if value_head:
        raise UserError(f"{folder} is a reward model: it scores text and cannot write any")
    tokenizer = Tokenizer.load(find_tokenizer(folder))
    config = Config.model_construct(model=model, parallel=parallel_config(settings, dtype))
    engine = Engine.from_pretrained(folder, config, train=False, vocab_size=tokenizer.vocab_size, seed=seed)
    return engine, tokenizer


def find_tokenizer(folder: Path) -> Path:
    """The folder of a checkpoint's tokenizer.json: what came with its Hugging Face checkpoint, else its own, else one
    of the three above it; UserError where there is none."""
    for place in (folder / "hf", folder, *list(folder.resolve().parents)[:3]):
        if (place / "tokenizer.json").exists():
            return place
    raise UserError(f"there is no tokenizer.json in {folder} nor in the folders above it")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint's folder: `path` itself (ours, or a Hugging Face folder), or the newest one directly inside a
    stage's folder."""
    path = Path(path)
    if any((path / name).exists() for name in ("state.json", "config.json")):
        return path
    unfinished = ("r1-partial", "r1-old")
    inside = [file.parent for file in path.glob("*/state.json") if not file.parent.name.endswith(unfinished)]
    if not inside:
        known = "does not exist" if not path.exists() else "holds no checkpoint"
        raise UserError(f"checkpoint {path} {known}, wanted a folder with a state.json or config.json")
    kept = [folder for folder in inside if ".step-" not in folder.name]  # else only older ones are left
    return max(kept or inside, key=lambda folder: (folder / "state.json").stat().st_mtime)
