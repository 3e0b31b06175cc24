"""Continuous batching: sequences enter the running batch as others leave it, over pages that they share.

A request's copies share the pages that its prompt fills. One step prefills a part of what was admitted, advances every
running sequence by a token (with speculation by up to two), and says what that added. Where pages run out the youngest
give theirs back and are computed again later. What a sequence is given depends on none of this.

Processes that hold parts of one model submit and abort alike, and take the same decisions.
"""

from __future__ import annotations

import collections.abc
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1.engine.data.tokenizer import Tokenizer
from r1.engine.drawing import drawn
from r1.engine.errors import UserError
from r1.engine.requests import Group, Request, Sequence, Update, check_prompt
from r1.engine.sampling import Completion, FinishReason, streams
from r1.engine.text import TextStream
from r1.parallel.decode import Chunk, Decoder
from r1.parallel.paging import BlockTable
from r1.parallel.trainer import Trainer

MEMORY_FRACTION = 0.5  # of what is free, for a cache whose size nobody gave


class Scheduler:
    """One model's running batch: at most `max_sequences` at once, over a cache of `cache_tokens` tokens (default: what
    that many of the longest need, or half of the memory that is free, if that is less). A step prefills at most
    `prefill_tokens`. With `speculate` the model's multi-token-prediction layer guesses tokens ahead.

    Expert-parallel replicas step together: when one of them has submitted, all call `step` until all are idle.

    Weights are the trainer's own. Call `pause` before they change and set `weight_version` to what it is then; the
    next step goes on. Raises UserError for a size that cannot work.
    """

    def __init__(
        self,
        trainer: Trainer,
        vocab_size: int,
        *,
        max_sequences: int = 256,
        cache_tokens: int | None = None,
        prefill_tokens: int = 8192,
        speculate: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        for name, value in (
            ("max_sequences", max_sequences),
            ("cache_tokens", cache_tokens),
            ("prefill_tokens", prefill_tokens),
        ):
            if value is not None and value < 1:
                raise UserError(f"{name} = {value} must be at least 1")
        if speculate and not trainer.model_config.num_mtp_layers:
            raise UserError("speculation needs a model with a multi-token-prediction layer; model.num_mtp_layers is 0")
        self.trainer, self.vocab_size, self.tokenizer = trainer, vocab_size, tokenizer
        self.limit = trainer.model_config.max_positions
        self.max_sequences, self.prefill_tokens = max_sequences, prefill_tokens
        if cache_tokens is None:
            cache_tokens = Decoder.room(trainer, max_sequences * self.limit, MEMORY_FRACTION)
        self.decoder = Decoder(trainer, cache_tokens, drafts=speculate)
        self.pages = self.decoder.pages
        self.weight_version = 0
        self.waiting: deque[Group] = deque()
        self.prefilling: deque[Group] = deque()
        self.ready: deque[Group] = deque()
        self.running: list[Sequence] = []
        self.table = BlockTable(self.pages.for_tokens(self.limit))
        self._aborted: set[Any] = set()
        self._spent: list[Sequence] = []  # begun completions that may have no more tokens
        self._open, self._all_idle = True, False
        self.counts = dict.fromkeys(
            ("tokens_generated", "tokens_prefilled", "evictions", "drafts_proposed", "drafts_accepted"), 0
        )

    # ------------------------------------------------------------------------------------------------ from outside

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. Raises UserError where it never can have one."""
        length = len(request.prompt)
        check_prompt(request.prompt, self.trainer.model_config)
        for name in ("copies", "max_new_tokens"):
            value = getattr(request, name)
            if value is not None and value < 1:
                raise UserError(f"{name} = {value} must be at least 1")
        if request.begun and len(request.begun) != request.copies:
            raise UserError(
                f"begun has {len(request.begun)} completions, wanted one for each of {request.copies} copies"
            )
        bad = next((t for t, _ in request.sampling.logit_bias if t >= self.vocab_size), None)
        if bad is not None:
            raise UserError(f"logit_bias names token {bad}; this model knows 0 to {self.vocab_size - 1}")
        if request.sampling.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer")
        budget = min(request.sampling.max_tokens, self.limit - length)
        if self.pages.for_tokens(length + budget) > self.pages.total:
            raise UserError(
                f"{length} tokens of prompt and {budget} more do not fit into the cache's"
                f" {self.pages.total * self.pages.size}: lower max_tokens or raise cache_tokens"
            )
        numbers = streams(request.seed, range(request.copies)).tolist()
        begun = [completion.copy() for completion in request.begun] or [Completion() for _ in numbers]
        same: dict[tuple[int, ...], Group] = {}
        for copy, (stream, completion) in enumerate(zip(numbers, begun, strict=True)):
            if not completion.open:
                continue
            completion.finish_reason = None
            limit = min(budget, len(completion.tokens) + (request.max_new_tokens or budget))
            sequence = Sequence(request, copy, stream, budget, limit, completion)
            if len(completion.tokens) >= budget:
                self._spent.append(sequence)
                continue
            if self.tokenizer is not None:
                sequence.text = TextStream(self.tokenizer, request.sampling.stop)
                for token in completion.tokens:
                    sequence.text.push(token)
            text = [*request.prompt, *completion.tokens]
            same.setdefault(tuple(completion.tokens), Group(request, deque(), text)).sequences.append(sequence)
        self.waiting.extend(same.values())
        self._all_idle = False

    def abort(self, request_id: Any) -> None:
        """At the next step this request's completions end. One that is not known is ignored."""
        self._aborted.add(request_id)
        self._all_idle = False

    @property
    def idle(self) -> bool:
        """Nothing runs or waits; with expert parallelism on none of the processes."""
        return self._all_idle if self.decoder.in_step else not self._has_work

    def pause(self) -> list[tuple[Request, int, Completion]]:
        """Give the cache's memory back; what is not finished waits, with the tokens it has, to be computed again.
        Returns it: (request, copy, completion so far)."""
        groups = self._groups()
        self._release(groups)
        self.waiting = deque(groups)
        self.prefilling.clear()
        self.ready.clear()
        self.running, self._open = [], False
        self.table.keep([])
        self.decoder.caches.clear()
        return [(s.request, s.copy, s.completion.copy()) for group in groups for s in group.sequences]

    def statistics(self) -> dict[str, float]:
        """Counts since the beginning, and what there is now."""
        return {
            **self.counts,
            "running": len(self.running),
            "waiting": sum(len(g.sequences) for g in (*self.waiting, *self.prefilling, *self.ready)),
            "pages_used": self.pages.used,
            "pages_total": self.pages.total,
            "page_tokens": self.pages.size,
        }

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One iteration. Expert-parallel processes call it alike, until all are idle."""
        if not self._open:
            self.decoder.open()
            self._open = True
        updates = self._end()
        self._admit()
        prefill, decode, busy = self.decoder.agree(bool(self.prefilling), bool(self.running), self._has_work)
        self._all_idle = not busy
        if not busy:
            return updates
        sequences, hidden_TH = self._decode() if decode else ([], self.decoder.no_hidden())
        if prefill:
            self._prefill()
        sequences, hidden_TH = self._begin(sequences, hidden_TH)
        return updates + self._advance(sequences, hidden_TH)

    # ------------------------------------------------------------------------------------------------ who runs

    @property
    def _has_work(self) -> bool:
        return bool(self.running or self.waiting or self.prefilling or self.ready or self._aborted or self._spent)

    def _groups(self) -> list[Group]:
        """All that is not finished, the oldest first."""
        running = [self._alone(sequence) for sequence in self.running]
        return [*running, *self.ready, *self.prefilling, *self.waiting]

    def _alone(self, sequence: Sequence) -> Group:
        return Group(sequence.request, deque([sequence]), [*sequence.request.prompt, *sequence.tokens], sequence.pages)

    def _release(self, groups: collections.abc.Sequence[Group]) -> None:
        for group in groups:
            self.pages.release(group.pages)
            group.pages, group.cached, group.hidden_H = [], 0, None
            for sequence in group.sequences:
                sequence.pages, sequence.draft = [], None

    def _end(self) -> list[Update]:
        """Those that were aborted, or are too late."""
        updates = [self._finish(s, Update(s.request.id, s.copy, [], [], []), "length") for s in self._spent]
        self._spent = []
        reasons: dict[int, FinishReason] = {}
        requests = list({id(request): request for request in self._requests()}.values())
        dated = [request for request in requests if request.deadline is not None]
        if dated:
            now = time.monotonic()
            late = self.decoder.one_replica_agrees(*[(request.deadline or now) <= now for request in dated])
            reasons.update({id(request): "deadline" for request, is_late in zip(dated, late) if is_late})
        if self._aborted:
            aborted, self._aborted = self._aborted, set()
            reasons.update({id(request): "abort" for request in requests if request.id in aborted})
        if not reasons:
            return updates
        for queue in (self.ready, self.prefilling, self.waiting):
            over = [group for group in queue if id(group.request) in reasons]
            self._release(over)
            for group in over:
                queue.remove(group)
                updates += [
                    self._finish(s, Update(group.request.id, s.copy, [], [], []), reasons[id(group.request)])
                    for s in group.sequences
                ]
        kept = []
        for row, sequence in enumerate(self.running):
            reason = reasons.get(id(sequence.request))
            if reason is None:
                kept.append(row)
            else:
                updates.append(self._finish(sequence, Update(sequence.request.id, sequence.copy, [], [], []), reason))
        self._keep(kept)
        return updates

    def _requests(self) -> Iterator[Request]:
        for sequence in self.running:
            yield sequence.request
        for group in (*self.ready, *self.prefilling, *self.waiting):
            yield group.request

    def _admit(self) -> None:
        """From those that wait, in order, as rows and pages allow. Some pages are left for those that run to grow:
        whoever enters is the first to be put out again."""
        entering = sum(len(group.sequences) for group in (*self.prefilling, *self.ready))
        while self.waiting and len(self.running) + entering < self.max_sequences:
            group = self.waiting[0]
            needed = self.pages.for_tokens(len(group.text))
            others = len(self.running) + entering
            if others and needed + others // 16 + 1 > len(self.pages.free):
                return
            group.pages = self.pages.take(needed)
            self.prefilling.append(self.waiting.popleft())
            entering += len(group.sequences)

    def _evict(self) -> None:
        """The youngest gives its pages back and waits, the first in the queue."""
        if self.prefilling:
            group = self.prefilling.pop()
        elif self.ready:
            group = self.ready.pop()
        else:
            group = self._alone(self.running[-1])
            self._keep(range(len(self.running) - 1))
        self._release([group])
        self.waiting.appendleft(group)
        self.counts["evictions"] += 1

    def _keep(self, rows: collections.abc.Sequence[int]) -> None:
        if len(rows) < len(self.running):
            self.running = [self.running[row] for row in rows]
            self.table.keep(rows)

    # ------------------------------------------------------------------------------------------------ the forwards

    def _decode(self) -> tuple[list[Sequence], Tensor | None]:
        """Every running sequence's last token and, where there is one, the guess at its next go into the cache."""
        self._make_room()
        rows, tokens, positions = [], [], []
        for row, sequence in enumerate(self.running):
            for ahead, token in enumerate((sequence.tokens[-1], sequence.draft)):
                if token is not None:
                    rows.append(row)
                    tokens.append(token)
                    positions.append(sequence.cached + ahead)
            sequence.cached += 1
        hidden_TH = self.decoder.decode(self._integers(tokens), self._integers(positions), self._tables(rows))
        return list(self.running), hidden_TH

    def _make_room(self) -> None:
        """A page for each running sequence whose next tokens want one, the oldest first, at the youngest's cost."""
        row = 0
        while row < len(self.running):
            sequence = self.running[row]
            wanted = self.pages.for_tokens(sequence.cached + (1 if sequence.draft is None else 2))
            if len(sequence.pages) >= wanted:
                row += 1
            elif self.pages.free:
                self.table.rows[row, len(sequence.pages)] = self.pages.free[-1]
                sequence.pages += self.pages.take(1)
            else:
                self._evict()

    def _prefill(self) -> None:
        budget, chunks = self.prefill_tokens, []
        for group in self.prefilling:
            part = group.text[group.cached : group.cached + budget]
            if not part:
                break
            end = group.cached + len(part)
            next_token = group.text[end] if end < len(group.text) else None
            chunks.append(Chunk(part, group.cached, group.pages, next_token))
            group.cached = end
            budget -= len(part)
        hidden_TH = self.decoder.prefill(chunks)
        self.counts["tokens_prefilled"] += self.prefill_tokens - budget
        for row, chunk in enumerate(chunks):
            if chunk.next_token is None:
                group = self.prefilling.popleft()
                group.hidden_H = None if hidden_TH is None else hidden_TH[row]
                self.ready.append(group)

    def _begin(self, sequences: list[Sequence], hidden_TH: Tensor | None) -> tuple[list[Sequence], Tensor | None]:
        """Sequences of prefilled texts join the running ones, as rows and pages allow."""
        new: list[Sequence] = []
        hidden: list[Tensor] = []
        copied: list[tuple[int, int]] = []
        while self.ready and len(self.running) < self.max_sequences:
            group = self.ready[0]
            length = len(group.text)
            # The guesses' cache has no row yet for the last token: each sequence writes its own.
            whole = (length - (1 if self.decoder.drafts else 0)) // self.pages.size
            sequence = group.sequences[0]
            if len(group.sequences) == 1:
                sequence.pages = group.pages
            elif len(group.pages) - whole <= len(self.pages.free):
                sequence.pages, pairs = self.pages.fork(group.pages, whole)
                copied += pairs
            elif self.running:
                break
            else:  # nobody will give a page: the others' text is cached once more, later
                rest = list(group.sequences)[1:]
                self.waiting.appendleft(Group(group.request, deque(rest), group.text))
                group.sequences, sequence.pages = deque([sequence]), group.pages
            sequence.cached = length
            new.append(sequence)
            if group.hidden_H is not None:
                hidden.append(group.hidden_H)
            self.running.append(sequence)
            group.sequences.popleft()
            if not group.sequences:
                self.ready.popleft()
        if new:
            self.table.add([sequence.pages for sequence in new])
            self.decoder.copy_pages(copied)
            if hidden_TH is not None:
                hidden_TH = torch.cat([hidden_TH, torch.stack(hidden)])
        return sequences + new, hidden_TH

    def _advance(self, sequences: list[Sequence], hidden_TH: Tensor | None) -> list[Update]:
        """What is drawn after these hidden states, one for each sequence and one for each guess."""
        rows = [s for s in sequences for _ in range(1 if s.draft is None else 2)]
        places = [len(s.tokens) + ahead for s in sequences for ahead in range(1 if s.draft is None else 2)]
        tokens = self._draw(hidden_TH, rows, places)
        updates: list[Update] = []
        kept: list[int] = []
        row = 0
        taken: list[tuple[int, int, int, int]] = []  # row of hidden_TH, token drawn there, its sequence's row, place
        for index, sequence in enumerate(sequences):
            update, last = Update(sequence.request.id, sequence.copy, [], [], []), row
            updates.append(update)
            reason = self._give(sequence, update, tokens[row])
            right = sequence.draft is not None and sequence.draft == sequence.tokens[-1]
            self.counts["drafts_proposed"] += sequence.draft is not None
            self.counts["drafts_accepted"] += right
            row += 1 if sequence.draft is None else 2
            if right and reason is None:
                reason = self._give(sequence, update, tokens[last + 1])
                sequence.cached += 1
            if reason is not None:
                self._finish(sequence, update, reason)
                continue
            count = len(update.tokens)
            for ahead, token in enumerate(update.tokens):
                taken.append((last + ahead, token, len(kept), sequence.cached - count + ahead))
            kept.append(index)
        self.counts["tokens_generated"] += sum(len(update.tokens) for update in updates)
        self._keep(kept)
        if self.decoder.drafts:
            self._guess(hidden_TH, taken)
        return updates

    def _guess(self, hidden_TH: Tensor | None, taken: list[tuple[int, int, int, int]]) -> None:
        """Each running sequence's next token, where two more may come."""
        hidden_rows, tokens, rows, places = zip(*taken) if taken else ([], [], [], [])
        if hidden_TH is not None:
            hidden_TH = hidden_TH[self._integers(hidden_rows)]
        hidden_TH = self.decoder.draft(hidden_TH, self._integers(tokens), self._integers(places), self._tables(rows))
        newest = {row: index for index, row in enumerate(rows)}
        wanted = [(s, newest[row]) for row, s in enumerate(self.running) if len(s.tokens) + 2 <= s.limit]
        for sequence in self.running:
            sequence.draft = None
        if hidden_TH is not None:
            hidden_TH = hidden_TH[self._integers([index for _, index in wanted])]
        guesses = self._draw(hidden_TH, [s for s, _ in wanted], [len(s.tokens) for s, _ in wanted], guess=True)
        for (sequence, _), row in zip(wanted, guesses, strict=True):
            sequence.draft = int(row[0])

    # ------------------------------------------------------------------------------------------------ the tokens

    def _draw(
        self, hidden_TH: Tensor | None, rows: list[Sequence], places: list[int], guess: bool = False
    ) -> list[list[float]]:
        asked = [(s.request.sampling, s.stream, place) for s, place in zip(rows, places, strict=True)]
        return drawn(self.decoder, self.vocab_size, hidden_TH, asked, guess)

    def _give(self, sequence: Sequence, update: Update, drawn: list[float]) -> FinishReason | None:
        """One more token; the reason why it is the last, if it is."""
        sampling, completion, token = sequence.request.sampling, sequence.completion, int(drawn[0])
        count = (len(drawn) - 2) // 2
        top = [(int(i), x) for i, x in zip(drawn[2 : 2 + sampling.top_logprobs], drawn[2 + count :])]
        update.tokens.append(token)
        update.logprobs.append(drawn[1])
        completion.tokens.append(token)
        completion.logprobs.append(drawn[1])
        completion.weight_versions.append(self.weight_version)
        if sampling.top_logprobs:
            update.top_logprobs.append(top)
            completion.top_logprobs.append(top)
        if token in sampling.stop_ids:
            return "stop"
        if sequence.text is not None:
            update.text += sequence.text.push(token)
            if sequence.text.stopped:
                return "stop"
        if len(completion.tokens) < sequence.limit:
            return None
        return "length" if sequence.limit == sequence.budget else "deadline"

    def _finish(self, sequence: Sequence, update: Update, reason: FinishReason) -> Update:
        self.pages.release(sequence.pages)
        sequence.pages = []
        if sequence.text is not None:
            update.text += sequence.text.finish()
        update.finish_reason = sequence.completion.finish_reason = reason
        update.completion = sequence.completion
        return update

    # ------------------------------------------------------------------------------------------------ small things

    def _integers(self, values: collections.abc.Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.decoder.device)

    def _tables(self, rows: collections.abc.Sequence[int]) -> Tensor:
        """The pages of these running sequences, no wider than the longest needs."""
        width = max((len(sequence.pages) for sequence in self.running), default=1)
        table = self.table.rows[np.asarray(rows, dtype=np.int64), :width]
        return torch.from_numpy(table).to(self.decoder.device)


__all__ = ["Request", "Scheduler", "Update"]
