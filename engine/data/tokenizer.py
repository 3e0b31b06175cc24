"""Tokenizer: one small interface over Hugging Face `tokenizers`.

`train_tokenizer` makes the tiny preset's byte-level BPE; `Tokenizer.load` reads one saved by us or the
`tokenizer.json` of a Hugging Face model directory (DeepSeek-V3, Qwen2, Llama).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from r1.engine.errors import UserError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
USER, ASSISTANT = "<user>", "<assistant>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# A run of letters, a number of one or two digits or a run of other marks, each with its leading space. A small number
# is one token, so that what a small model copies or adds stands at a fixed distance; so are set Chinese phrases.
_PIECES = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"

# How the model families that r1 trains name their control tokens, in order of preference.
_BOS_NAMES = (BOS, "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>")
_EOS_NAMES = (EOS, "<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
_PAD_NAMES = (PAD, "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>")

# How a byte-level vocabulary writes bytes: a visible one as itself, the others as the characters from 256 on (GPT-2).
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}


class Tokenizer:
    """Text to token ids and back.

    Attributes: `vocab_size` (int, highest id + 1; the model pads it as it needs), `bos_id` (int, or None for
    families without one), `eos_id` and `pad_id` (int; a family without a pad token pads with eos); `prompt_template`
    (str, what a model is to read before its completion, with {question} in it; None for r1's own forms).
    """

    prompt_template: str | None = None

    def __init__(self, backend: Backend, *, bos: str | None = None, eos: str | None = None, pad: str | None = None):
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1

        def find(given: str | None, names: tuple[str, ...]) -> int | None:
            if given is not None and given not in vocabulary:
                raise ValueError(f"control token {given!r} is not in the tokenizer's vocabulary; wanted one that is")
            return vocabulary[given] if given else next((vocabulary[n] for n in names if n in vocabulary), None)

        eos_id = find(eos, _EOS_NAMES)
        if eos_id is None:
            raise ValueError(f"eos: no end-of-text token found; wanted one of {', '.join(_EOS_NAMES)}, or its name")
        pad_id = find(pad, _PAD_NAMES)
        self.bos_id: int | None = find(bos, _BOS_NAMES)
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self._added = backend.get_added_tokens_decoder()
        self._control = {token for token in (self.bos_id, self.eos_id, self.pad_id) if token is not None}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added before or after. Tags such as `<think>` are one token if known."""
        # Of a batch, since that lets other threads run meanwhile; fast, since offsets are not wanted.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`. `skip_special` drops bos, eos and pad, and keeps the think and answer tags."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self._control)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def stream(self) -> Callable[[int], str]:
        """A function of one token after another: the text that it adds, "" until its characters are whole."""
        stream = DecodeStream(skip_special_tokens=False)

        def step(token: int) -> str:
            nonlocal stream
            try:
                return stream.step(self._backend, token) or ""
            except Exception as error:  # tokenizers has no type of its own for it
                # A decoder whose text does not grow by what is added: begin anew with this token.
                if "prefix" not in str(error):
                    raise
                stream = DecodeStream(skip_special_tokens=False)
                return stream.step(self._backend, token) or ""

        return step

    def token_id(self, token: str) -> int | None:
        """Id of one token by name, None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text: perhaps part of a character. Nothing, for an id that the vocabulary lacks."""
        name = self._backend.id_to_token(token) or ""
        byte_level = isinstance(self._backend.decoder, decoders.ByteLevel) and token not in self._added
        if byte_level and _BYTES.keys() >= set(name):
            return bytes(_BYTES[character] for character in name)
        return self._backend.decode([token], skip_special_tokens=False).encode()

    @property
    def longest_token(self) -> int:
        """The most characters of text that one token may stand for."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to `path` (a tokenizer.json)."""
        Path(path).write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or a Hugging Face directory that holds one. UserError if there is none to read."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer: no file {file}; give a tokenizer.json or a directory that holds one")
        try:
            backend = Backend.from_file(str(file))
            return cls(backend, **_control_names(file.parent / "tokenizer_config.json", backend))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise UserError(f"tokenizer: cannot read {file}: {error}") from None


def _control_names(config_file: Path, backend: Backend) -> dict[str, str]:
    """What a Hugging Face `tokenizer_config.json` calls bos, eos and pad; empty if the file is absent."""
    if not config_file.is_file():
        return {}
    config = json.loads(config_file.read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for key in ("bos", "eos", "pad"):
        value = config.get(f"{key}_token")
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str) and backend.token_to_id(name) is not None:
            names[key] = name
    return names


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `texts`: 256 bytes, the control tokens, then merges up to `vocab_size`.

    Deterministic: the same texts in the same order give the same file. Fewer merges are made if the texts have no
    more pairs. ValueError if `vocab_size` leaves no room for the bytes and control tokens.
    """
    controls = (PAD, BOS, EOS, USER, ASSISTANT, *TAGS)
    least = len(controls) + 256
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; wanted at least {least} (256 bytes and the control tokens)")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # Not "special" in the library's sense: decoding must keep the tags, the rewards read them.
        special_tokens=[AddedToken(token, special=False, normalized=False) for token in controls],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, bos=BOS, eos=EOS, pad=PAD)
