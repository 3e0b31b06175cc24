"""Completions in the shapes of OpenAI's answers: whole ones, and the chunks of a stream."""

from __future__ import annotations

import codecs
import time
import uuid
from typing import Any

from r1.engine.data.tokenizer import Tokenizer
from r1.engine.serve.chat import ReasoningSplit
from r1.engine.serve.protocol import Call
from r1.engine.serve.streams import Piece

# OpenAI knows no reason for the time limit; "length" is the one that says: cut off.
REASONS = {"stop": "stop", "length": "length", "deadline": "length"}
LEAST_LOGPROB = -9999.0  # what OpenAI writes where a token is impossible; JSON has no infinity


class Answer:
    """What both endpoints' answers have in common. `delta` and `choice` are one completion's part of a chunk and of a
    whole answer."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, call: Call, name: str, tokenizer: Tokenizer) -> None:
        self.call, self.tokenizer = call, tokenizer
        self.completion_tokens = 0
        identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head = {"id": identity, "created": int(time.time()), "model": name}

    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        self._count(pieces)
        choices = [self.choice(index, piece) for index, piece in sorted(pieces.items())]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def chunks(self, pieces: dict[int, Piece]) -> list[dict[str, Any]]:
        self._count(pieces)
        choices = [choice for index, piece in sorted(pieces.items()) for choice in self.delta(index, piece)]
        usage = {"usage": None} if self.call.include_usage else {}
        return [{**self._head, "object": self.chunk_kind, "choices": [choice], **usage} for choice in choices]

    def last_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage()}

    def delta(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        raise NotImplementedError

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        """A token as text; where it is part of a character, its bytes by name."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _count(self, pieces: dict[int, Piece]) -> None:
        self.completion_tokens += sum(len(piece.tokens) for piece in pieces.values())

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.call.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class CompletionAnswer(Answer):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, call: Call, name: str, tokenizer: Tokenizer) -> None:
        super().__init__(call, name, tokenizer)
        self._places: dict[int, tuple[Any, int]] = {}  # of each choice: its bytes' decoder, the characters so far

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(index, piece) if self.call.wants_logprobs else None
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": REASONS.get(piece.finish_reason or ""),
        }

    def delta(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        if not piece.text and not piece.finish_reason and not (self.call.wants_logprobs and piece.tokens):
            return []
        return [self.choice(index, piece)]

    def _logprobs(self, index: int, piece: Piece) -> dict[str, list[Any]]:
        tops = []
        for token, logprob, top in zip(piece.tokens, piece.logprobs, piece.top_logprobs or [[]] * len(piece.tokens)):
            texts = {self.token_text(other): max(value, LEAST_LOGPROB) for other, value in reversed(top)}
            tops.append({**texts, self.token_text(token): max(logprob, LEAST_LOGPROB)})
        return {
            "tokens": [self.token_text(token) for token in piece.tokens],
            "token_logprobs": [max(value, LEAST_LOGPROB) for value in piece.logprobs],
            "top_logprobs": tops,
            "text_offset": [self._offset(index, token) for token in piece.tokens],
        }

    def _offset(self, index: int, token: int) -> int:
        """Whole characters of the completion before this token."""
        decoder, offset = self._places.get(index, (None, 0))
        decoder = decoder or codecs.getincrementaldecoder("utf-8")("replace")
        self._places[index] = decoder, offset + len(decoder.decode(self.tokenizer.token_bytes(token)))
        return offset


class ChatAnswer(Answer):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, call: Call, name: str, tokenizer: Tokenizer) -> None:
        super().__init__(call, name, tokenizer)
        self._splits: dict[int, ReasoningSplit] = {}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        reasoning, content = ReasoningSplit(self.call.in_reasoning).push(piece.text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": REASONS.get(piece.finish_reason or ""),
        }

    def delta(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if index not in self._splits:
            self._splits[index] = ReasoningSplit(self.call.in_reasoning)
            deltas.append({"role": "assistant", "content": ""})
        reasoning, content = self._splits[index].push(piece.text, last=piece.finish_reason is not None)
        if reasoning:
            deltas.append({"reasoning_content": reasoning})
        if content or (self.call.wants_logprobs and piece.tokens and not reasoning):
            deltas.append({"content": content})
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if self.call.wants_logprobs and piece.tokens:
            choices[-1]["logprobs"] = self._logprobs(piece)
        if piece.finish_reason is not None:
            reason = REASONS.get(piece.finish_reason)
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.call.wants_logprobs:
            return None
        tops = piece.top_logprobs or [[]] * len(piece.tokens)
        return {
            "content": [
                {**self._token(token, logprob), "top_logprobs": [self._token(*other) for other in top]}
                for token, logprob, top in zip(piece.tokens, piece.logprobs, tops)
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(self.tokenizer.token_bytes(token))
        return {"token": self.token_text(token), "bytes": data, "logprob": max(logprob, LEAST_LOGPROB)}
