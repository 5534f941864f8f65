"""Sampler: logits -> token ids, each row by its own parameters. Knows nothing of batches, text or adapters.

Order as vLLM's: penalties, temperature, min-p, top-k, top-p. A row draws one uniform number from its own generator
and inverts the cumulated probabilities, so that its tokens depend on its seed alone, never on its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from server.engine.request import NOT_FINITE, RowResult, SamplingParams, Sequence, TokenLogprobs


def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[RowResult]:
    """The next token of each sequence.

    logits: [n, vocabulary] fp32, overwritten for rows with penalties. Engine's thread only.
    """
    params = [_params(sequence) for sequence in sequences]
    finite = logits.amax(-1).isfinite().tolist()
    wanted = [row for row, p in enumerate(params) if p.logprobs is not None]
    raw = logits[wanted].log_softmax(-1) if wanted else None
    for row, sequence in enumerate(sequences):
        _restrain(logits[row], sequence, params[row])
    tokens = logits.argmax(-1).tolist()
    # Rows with top-k or top-p invert their probabilities in sorted order, others in the vocabulary's: apart, so that
    # no row's order depends on its neighbours.
    for cuts in (False, True):
        drawn = [row for row, p in enumerate(params) if not p.greedy and p.cuts == cuts]
        if drawn:
            chosen = _draw(logits[drawn], [sequences[row] for row in drawn], cuts)
            for row, token in zip(drawn, chosen, strict=True):
                tokens[row] = token
    results = [RowResult(token_id=token) for token in tokens]
    if raw is not None:
        for place, row in enumerate(wanted):
            results[row] = RowResult(tokens[row], _logprobs(raw[place], tokens[row], params[row].logprobs or 0))
    return [result if good else RowResult(error=NOT_FINITE) for result, good in zip(results, finite, strict=True)]


def _params(sequence: Sequence) -> SamplingParams:
    assert sequence.params is not None
    return sequence.params


def _restrain(logits: Tensor, sequence: Sequence, params: SamplingParams) -> None:
    """Penalties on one row, in place; end tokens are out of reach before `min_tokens`.

    repetition (prompt and output): logit / p if positive, · p if negative (CTRL, arXiv:1909.05858).
    frequency, presence (output only): logit − count · f − p (OpenAI).
    """
    if len(sequence.output_ids) < params.min_tokens:
        ends = params.stop_token_ids | (frozenset() if params.ignore_eos else sequence.eos_ids)
        logits[[end for end in sorted(ends) if end < len(logits)]] = float("-inf")
    if not params.penalised:
        return
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt_ids, *sequence.output_ids}), device=logits.device)
        values = logits[seen]
        p = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / p, values * p)
    if sequence.output_ids and (params.frequency_penalty or params.presence_penalty):
        counts = Counter(sequence.output_ids)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= times * params.frequency_penalty + params.presence_penalty


def _draw(logits: Tensor, sequences: SequenceOf[Sequence], cuts: bool) -> list[int]:
    """One token a row, with `cuts` from what top-k and top-p leave. logits: [n, vocabulary]."""
    params = [_params(sequence) for sequence in sequences]
    device = logits.device
    temperature = torch.tensor([max(p.temperature, 1e-5) for p in params], device=device)
    probs = (logits / temperature[:, None]).softmax(-1)
    if any(p.min_p > 0 for p in params):
        floor = torch.tensor([p.min_p for p in params], device=device)[:, None] * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    order = None
    if cuts:
        probs, order = probs.sort(-1, descending=True)
        probs = _restrict(probs, params)
    sums = probs.cumsum(-1, dtype=torch.float64)
    uniform = torch.tensor([s.rng.random() for s in sequences], dtype=torch.float64, device=device)
    places = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    last = (probs > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # never a token of probability 0
    places = torch.minimum(places, last)
    chosen = places if order is None else order.gather(-1, places)
    return [int(token) for token in chosen[:, 0].tolist()]


def _restrict(probs: Tensor, params: SequenceOf[SamplingParams]) -> Tensor:
    """Zero what top-k and then top-p leave out of descending probabilities [n, vocabulary].

    top-p keeps the smallest set whose share, of what top-k left, reaches p; always at least one token.
    """
    vocabulary = probs.shape[-1]
    k = torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=probs.device)[:, None]
    probs = probs.masked_fill(torch.arange(vocabulary, device=probs.device) >= k, 0.0)
    p = torch.tensor([p.top_p for p in params], device=probs.device)[:, None]
    before = probs.cumsum(-1) - probs
    outside = (before >= p * probs.sum(-1, keepdim=True)) & (p < 1.0)
    outside[:, 0] = False
    return probs.masked_fill(outside, 0.0)


def _logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    values, ids = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)
