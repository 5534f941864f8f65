"""Sampler: logits -> token ids, each row by its own parameters. Knows nothing of batches, text or adapters.

Order as vLLM's: biases, penalties, temperature, min-p, top-k, top-p. A row draws one uniform number from its own
generator and inverts the cumulated probabilities, so that its tokens depend on its seed alone, never on its neighbours.
The CPU kernels do this in one call (native/sampling.h) where they compute the base, too; elsewhere torch does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor, nn

from adapters.kernels.library import Draw, Library
from server.engine.device import to_device
from server.engine.grammar import Grammar, GrammarFailed
from server.engine.request import NOT_FINITE, RowResult, SamplingParams, Sequence, TokenLogprobs
from server.engine.restraints import is_restrained, restrain

BLOCK = 256
"""Numbers of a row that are cumulated, or whose greatest is found, together."""
LEAST_TEMPERATURE = 1e-5
"""Of what is drawn."""
NO_TOKEN, NONE_ALLOWED = -1, -2
"""In a token's place: the greatest logit is not finite (as native/sampling.h has it); nor is one of those allowed."""
FAULTS = {NO_TOKEN: NOT_FINITE, NONE_ALLOWED: "no token is allowed here"}
CANDIDATES = 512
"""The likeliest tokens of a row, sorted; a top-p or top-k that wants more sorts the whole vocabulary."""


def sample(logits: Tensor, sequences: SequenceOf[Sequence], library: Library | None = None) -> list[RowResult]:
    """The next token of each sequence.

    logits: [n, vocabulary] fp32, overwritten for rows with biases or penalties. library: the CPU kernels,
    where they shall draw. Waits for the device once, and once more for rows that want logprobs. Engine's thread only.
    """
    params = [_params(sequence) for sequence in sequences]
    held = {row: s.grammar for row, s in enumerate(sequences) if s.grammar is not None}
    restrained = {row: (s, p) for row, (s, p) in enumerate(zip(sequences, params, strict=True)) if is_restrained(s, p)}
    changed = sorted({*held, *restrained})
    # The kernels tell by themselves which rows are not finite, but not once these are changed.
    seen = changed if library is not None else list(range(len(sequences)))
    finite = _rows(logits, seen).amax(-1).isfinite() if seen else None
    wanted = [row for row, p in enumerate(params) if p.logprobs is not None]
    raw = _rows(logits, wanted).log_softmax(-1) if wanted else None
    restrain(logits, restrained)
    errors = _attempt(held, lambda row, grammar: _hold(logits[row], grammar))
    chosen = _choose(logits, sequences) if library is None else _choose_natively(library, logits, sequences)
    if finite is not None:
        (places,) = to_device(logits.device, [seen])
        own = chosen[places]
        chosen[places] = own.masked_fill(own == NO_TOKEN, NONE_ALLOWED).masked_fill(~finite, NO_TOKEN)
    tokens = chosen.tolist()
    for row, token in enumerate(tokens):
        if token in FAULTS:
            errors[row], tokens[row] = FAULTS[token], 0
    errors |= _attempt({r: g for r, g in held.items() if r not in errors}, lambda row, g: g.take(tokens[row]))
    results = [RowResult(token_id=token) for token in tokens]
    if raw is not None:
        counts = [params[row].logprobs or 0 for row in wanted]
        for row, entry in zip(wanted, token_logprobs(raw, [tokens[row] for row in wanted], counts), strict=True):
            results[row] = RowResult(tokens[row], entry)
    return [RowResult(error=errors[row]) if row in errors else result for row, result in enumerate(results)]


def _choose(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """[n] one token a row; NO_TOKEN where all are out of reach.

    Rows with top-k or top-p invert their probabilities in sorted order, others in the vocabulary's: apart, so that no
    row's order depends on its neighbours.
    """
    params = [_params(sequence) for sequence in sequences]
    chosen = greatest(logits)
    none = logits.gather(-1, chosen[:, None])[:, 0] == float("-inf")
    for cuts in (False, True):
        drawn = [row for row, p in enumerate(params) if not p.greedy and p.cuts == cuts]
        if drawn:
            (places,) = to_device(logits.device, [drawn])
            chosen[places] = _draw(_rows(logits, drawn), [sequences[row] for row in drawn], cuts)
    return chosen.masked_fill(none, NO_TOKEN)


def _choose_natively(library: Library, logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """As `_choose`; where probabilities are equal, top-k and top-p take the lower ids. NO_TOKEN where a row's greatest
    number is not finite."""
    logits = logits.contiguous()
    draws = (Draw * len(sequences))(*map(_rule, sequences))
    chosen = torch.empty(len(sequences), dtype=torch.int64)
    library.sample(logits.data_ptr(), *logits.shape, ctypes.addressof(draws), chosen.data_ptr())
    return chosen


def _rule(sequence: Sequence) -> Draw:
    p = _params(sequence)
    if p.greedy:
        return Draw()
    temperature, top_k = max(p.temperature, LEAST_TEMPERATURE), max(p.top_k, 0)
    return Draw(temperature, p.min_p, p.top_p, sequence.rng.random(), top_k)


def greatest(logits: Tensor) -> Tensor:
    """[n] the first place of the greatest number of each row [n, vocabulary], as `argmax`.

    On the CPU torch finds a maximum several times as fast as its place: first of blocks, then the place in one.
    """
    vocabulary = logits.shape[-1]
    whole = vocabulary // BLOCK
    if logits.device.type != "cpu" or whole < 2:
        return logits.argmax(-1)
    peaks = logits[:, : whole * BLOCK].view(-1, whole, BLOCK).amax(-1)
    if vocabulary % BLOCK:
        peaks = torch.cat([peaks, logits[:, whole * BLOCK :].amax(-1, keepdim=True)], -1)
    first = peaks.argmax(-1) * BLOCK
    places = (first[:, None] + torch.arange(BLOCK)).clamp_(max=vocabulary - 1)
    return first + logits.gather(-1, places).argmax(-1)


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """These rows, ascending; all of them without a copy."""
    return logits if len(rows) == len(logits) else logits.index_select(0, *to_device(logits.device, [rows]))


def _params(sequence: Sequence) -> SamplingParams:
    assert sequence.params is not None
    return sequence.params


def _attempt(held: Mapping[int, Grammar], step: Callable[[int, Grammar], None]) -> dict[int, str]:
    """Do `step` with each row's grammar; row -> why it failed, where it did."""
    errors = {}
    for row, grammar in held.items():
        try:
            step(row, grammar)
        except GrammarFailed as error:
            errors[row] = str(error)
    return errors


def _hold(logits: Tensor, grammar: Grammar) -> None:
    """Leave one row only what its grammar allows, in place. Raises GrammarFailed."""
    (forbidden,) = to_device(logits.device, [grammar.forbidden()], torch.bool)
    logits.masked_fill_(forbidden, float("-inf"))


def _draw(logits: Tensor, sequences: SequenceOf[Sequence], cuts: bool) -> Tensor:
    """[n] one token a row, with `cuts` from what top-k and top-p leave. logits: [n, vocabulary]."""
    params = [_params(sequence) for sequence in sequences]
    vocabulary = logits.shape[-1]
    temperature, min_p, top_p, top_k, uniform = to_device(
        logits.device,
        [
            [max(p.temperature, LEAST_TEMPERATURE) for p in params],
            [p.min_p for p in params],
            [p.top_p for p in params],
            [min(p.top_k or vocabulary, vocabulary) for p in params],
            [s.rng.random() for s in sequences],
        ],
        torch.float64,
    )
    probs = (logits / temperature.float()[:, None]).softmax(-1)
    if any(p.min_p > 0 for p in params):
        floor = min_p.float()[:, None] * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    return _draw_cut(probs, top_k, top_p, uniform) if cuts else _invert(probs, uniform)


def _draw_cut(probs: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """[n] from what top-k and top-p leave of probs [n, vocabulary]: of the likeliest ones where these are enough."""
    vocabulary = probs.shape[-1]
    values, ids = probs.topk(min(CANDIDATES, vocabulary))
    mass = torch.where(top_k < vocabulary, torch.nan, probs.sum(-1))
    enough = (top_k <= values.shape[-1]) | ((top_p < 1.0) & (values.sum(-1) >= top_p * mass))
    chosen = ids.gather(-1, _invert(_restrict(values, mass, top_k, top_p), uniform)[:, None])[:, 0]
    rest = (~enough).nonzero()[:, 0]
    if len(rest):
        values, ids = probs[rest].sort(-1, descending=True)
        left = _restrict(values, mass[rest], top_k[rest], top_p[rest])
        chosen[rest] = ids.gather(-1, _invert(left, uniform[rest])[:, None])[:, 0]
    return chosen


def _restrict(probs: Tensor, mass: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero what top-k and then top-p leave out of descending probabilities [n, c]; mass, top_k, top_p: [n].

    top-p keeps the smallest set whose share, of what top-k left, reaches p; always at least one token. `mass`: of the
    whole vocabulary where top-k leaves all of it, else NaN.
    """
    probs = probs.masked_fill(torch.arange(probs.shape[-1], device=probs.device) >= top_k[:, None], 0.0)
    p, total = top_p[:, None], torch.where(mass.isnan(), probs.sum(-1), mass)[:, None]
    before = probs.cumsum(-1) - probs
    outside = (before >= p * total) & (p < 1.0)
    outside[:, 0] = False
    return probs.masked_fill(outside, 0.0)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """[n] the first place where the cumulated probs [n, c] exceed uniform [n] (fp64, below 1) of their sum, in fp64.

    Blocks first, then inside one: the whole row need not be cumulated. Never a place of probability 0.
    """
    n, count = probs.shape
    blocks = nn.functional.pad(probs, (0, -count % BLOCK)).view(n, -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * sums[:, -1:]
    block = torch.minimum(torch.searchsorted(sums, target, right=True), _last_step(sums))
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(n, 1, BLOCK))[:, 0].double().cumsum(-1)
    place = torch.minimum(torch.searchsorted(before + inside, target, right=True), _last_step(inside))
    return (block * BLOCK + place)[:, 0]


def _last_step(sums: Tensor) -> Tensor:
    """[n, 1] where ascending sums [n, c] reach their end."""
    return (sums >= sums[:, -1:]).to(torch.uint8).argmax(-1, keepdim=True)


def token_logprobs(logprobs: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Of each row [vocabulary] its token and the so many likeliest ones. logprobs: [n, vocabulary]."""
    width = max(counts)
    values, ids = logprobs.topk(width)
    own = logprobs.gather(-1, to_device(logprobs.device, [tokens])[0][:, None])
    # One copy to the host: fp64 holds ids and fp32 values exactly.
    rows = torch.cat([own.double(), values.double(), ids.double()], -1).tolist()
    entries = []
    for token, count, (value, *rest) in zip(tokens, counts, rows, strict=True):
        likeliest = zip(map(int, rest[width : width + count]), rest[:count], strict=True)
        entries.append(TokenLogprobs(token, value, tuple(likeliest)))
    return entries
