"""Pages of a cache: random schedules lose none, share none wrongly, and read none that is free."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1.parallel.config import ParallelConfig
from r1.parallel.decode import Decoder
from r1.parallel.paging import SCRATCH, PagedSequences, Pages
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel.tiny import MODELS, VOCABULARY


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pages_are_free_or_held(data: st.DataObject) -> None:
    """Any order of taking, sharing and releasing, against a multiset of holders."""
    count = data.draw(st.integers(1, 8))
    pages, held = Pages(count), []
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["take", "share", "release"]))
        if action == "take":
            if len(set(held)) == count - 1:
                with pytest.raises(MemoryError, match=f"none of the cache's {count - 1} pages is free"):
                    pages.take()
                continue
            page = pages.take()
            assert page not in held and SCRATCH < page < count, "a page was given out twice"
            held.append(page)
        elif held:
            page = data.draw(st.sampled_from(held))
            if action == "share":
                held.append(pages.share(page))
            else:
                pages.release(page)
                held.remove(page)
        assert sorted(pages.free + sorted(set(held))) == list(range(1, count)), "a page was lost"
    for page in [SCRATCH, -1, count, *pages.free]:
        for act in (pages.share, pages.release):
            with pytest.raises(ValueError, match=f"page is {page}, wanted one that is held"):
                act(page)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_sequences_read_what_was_written_for_them(data: st.DataObject) -> None:
    """A cache of plain numbers beside the tables: prompts, copies, tokens and leavings in any order."""
    page_size, copies = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    longest = max(lengths) + data.draw(st.integers(0, 9))
    sequences = PagedSequences(lengths, copies, longest, page_size)
    cache = [[None] * page_size for _ in sequences.pages.holders]

    def slot(row: int, place: int) -> tuple[int, int]:
        return sequences.held[row][place // page_size], place % page_size

    texts: list[list[object]] = []
    for prompt, length in enumerate(lengths):
        for place in range(length):
            page, at = slot(prompt * copies, place)
            cache[page][at] = (prompt, place)
        texts += [[(prompt, place) for place in range(length)] for _ in range(copies)]
    for source, target in sequences.copied:
        cache[target] = list(cache[source])
    for step in range(longest - max(lengths)):
        if texts and data.draw(st.booleans()):
            rows = data.draw(st.lists(st.sampled_from(range(len(texts))), unique=True))
            sequences.keep(rows)
            texts = [texts[row] for row in rows]
            for page in sequences.pages.free:
                cache[page] = ["read after it was free"] * page_size
        sequences.append()
        for row, text in enumerate(texts):
            page, at = slot(row, len(text))
            assert sequences.pages.holders[page] == 1, "a page that others read was written"
            cache[page][at] = text_token = (step, row)
            text.append(text_token)
        for row, text in enumerate(texts):
            assert [cache[page][at] for page, at in (slot(row, place) for place in range(len(text)))] == text
    table = sequences.table(len(texts) + 2, torch.device("cpu"))
    assert table.dtype == torch.int32 and table.shape == (len(texts) + 2, sequences.room)
    assert table[len(texts) :].eq(SCRATCH).all()
    sequences.keep([])
    assert sorted(sequences.pages.free) == list(range(1, len(cache))), "a page was lost"


@torch.no_grad()
@pytest.mark.parametrize("model", ["deepseek", "llama"])
def test_what_stands_in_free_pages_is_not_read(seed: int, model: str) -> None:
    """NaN in every free page, and wherever no token is yet, changes no bit of what follows."""
    parallel = ParallelConfig()
    trainer = Trainer(MODELS[model], parallel, join(parallel), seed=3)
    prompts = [torch.randint(VOCABULARY, (n,)).tolist() for n in (3, 17, 16, 30)]
    tokens = torch.randint(VOCABULARY, (24, 8))

    def decode(poisoned: bool) -> list[torch.Tensor]:
        decoder = Decoder(trainer, prompts, 2, 54)
        rows, found = torch.arange(8), []
        for step in range(24):
            if step in (5, 11):
                kept = torch.arange(len(rows))[step % 2 :: 2]
                decoder.keep(kept)
                rows = rows[kept]
            if poisoned:
                for cache in (cache for layer in decoder.caches.values() for cache in layer):
                    cache[decoder.sequences.pages.free] = float("nan")
            decoder.append(tokens[step, rows])
            found.append(decoder.logits(VOCABULARY))
        return found

    for clean, poisoned in zip(decode(False), decode(True), strict=True):
        assert poisoned.isfinite().all() and torch.equal(clean, poisoned)


@torch.no_grad()
def test_sequences_in_another_order_keep_their_pages(seed: int) -> None:
    parallel = ParallelConfig()
    trainer = Trainer(MODELS["deepseek"], parallel, join(parallel), seed=3)
    prompts, tokens = [[3, 1, 4], [1, 5], [9, 2, 6, 5]], torch.randint(VOCABULARY, (2, 6))
    straight, turned = Decoder(trainer, prompts, 2, 8), Decoder(trainer, prompts, 2, 8)
    for decoder in (straight, turned):
        decoder.append(tokens[0])
    turned.keep(torch.arange(5, -1, -1))
    straight.append(tokens[1])
    turned.append(tokens[1].flip(0))
    torch.testing.assert_close(turned.logits(VOCABULARY).flip(0), straight.logits(VOCABULARY), rtol=0, atol=1e-4)
