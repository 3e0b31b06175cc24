"""The tokens that follow hidden states, drawn and told, on every process that holds a part of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r1.engine.sampling import Rules, SamplingParameters, draw, reported
from r1.parallel.decode import Decoder

DRAWN_ROWS = 512

# How a row's token is drawn, the completion's stream, and the token's place.
Asked = tuple[SamplingParameters, int, int]


def drawn(
    decoder: Decoder, vocab_size: int, hidden_TH: Tensor | None, asked: Sequence[Asked], guess: bool = False
) -> list[list[float]]:
    """For each row the token, its log-probability, and of the likeliest the ids, the likeliest first, and then the
    same; of a guess the token alone. Some rows at a time: a vocabulary of 129,280 in float64 is 1 MB a row."""
    found = []
    for begin in range(0, len(asked), DRAWN_ROWS):
        part = slice(begin, begin + DRAWN_ROWS)
        found += _drawn_rows(decoder, vocab_size, None if hidden_TH is None else hidden_TH[part], asked[part], guess)
    return found


def _drawn_rows(
    decoder: Decoder, vocab_size: int, hidden_TH: Tensor | None, asked: Sequence[Asked], guess: bool
) -> list[list[float]]:
    parameters, streams, places = zip(*asked)
    count = 0 if guess else min(max(p.top_logprobs for p in parameters), vocab_size)
    logits_TV = decoder.logits(hidden_TH, vocab_size)
    columns_TC = None
    if hidden_TH is not None and logits_TV is not None:
        rules = Rules(parameters, decoder.device)
        streams_T, places_T = (torch.tensor(x, dtype=torch.int64, device=decoder.device) for x in (streams, places))
        ids = draw(logits_TV, streams_T, places_T, rules)
        if guess:
            columns = [ids[:, None]]
        else:
            logprobs, top_ids, top = reported(logits_TV, ids, rules)
            if decoder.exact:
                logprobs = _exact_logprobs(decoder, vocab_size, hidden_TH, ids, parameters)
            columns = [ids[:, None], logprobs[:, None], top_ids, top]
        columns_TC = torch.cat([column.double() for column in columns], 1)
    width = 1 if guess else 2 + 2 * count
    return decoder.share(columns_TC, (len(asked), width), torch.float64).tolist()


def _exact_logprobs(
    decoder: Decoder, vocab_size: int, hidden_TH: Tensor, ids_T: Tensor, parameters: Sequence[SamplingParameters]
) -> Tensor:
    """By the kernel that training uses; a row's result does not depend on the others."""
    logprobs_T = torch.empty(len(ids_T), device=ids_T.device)
    temperatures = [p.reported_temperature for p in parameters]
    for temperature in set(temperatures):
        rows = torch.tensor([i for i, t in enumerate(temperatures) if t == temperature], device=ids_T.device)
        logprobs_T[rows] = decoder.logprobs(hidden_TH[rows], ids_T[rows], temperature, vocab_size)
    return logprobs_T
