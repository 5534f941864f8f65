"""What a base's generation_config says of every target, as transformers' `generate` reads it. No tensors."""

from __future__ import annotations

from typing import Any

from server.engine.stack import CannotServe

UNHEEDED = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "sequence_bias": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
}
"""What is not carried out, and the value with which there is nothing to carry out."""


def start_ids(model: Any) -> tuple[int, ...]:
    """As `generate` begins, with a token that is forced to come first. Raises CannotServe."""
    generation = model.generation_config
    start, forced = generation.decoder_start_token_id, generation.forced_bos_token_id
    start = generation.bos_token_id if start is None else start
    if start is None:
        raise CannotServe("names no token that a target starts with (decoder_start_token_id)")
    return (start,) if forced is None else (start, forced)


def forbidden(model: Any) -> frozenset[int]:
    """Single tokens that `generate` never gives."""
    generation = model.generation_config
    words = [word for word in generation.bad_words_ids or [] if len(word) == 1]
    return frozenset([word[0] for word in words] + list(generation.suppress_tokens or []))


def unheeded(model: Any) -> list[str]:
    """Names of what `generate` would do beside, and nothing here does unless a request asks for it."""
    generation = model.generation_config
    values = {name: getattr(generation, name, None) for name in UNHEEDED}
    names = [name for name, value in values.items() if value not in (None, [], UNHEEDED[name])]
    if any(len(word) > 1 for word in generation.bad_words_ids or []):
        names.append("bad_words_ids of several tokens")
    return names
