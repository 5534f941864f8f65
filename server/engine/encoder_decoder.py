"""EncoderDecoder: what is learned at start of a base with an encoder and a decoder, from the base itself.

Knows nothing of adapters or batches, and no architecture by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engine.attention import RelativeBias
from server.engine.stack import CannotServe, Run, Stack, find_positions, probe_ids
from server.engine.target_tokens import forbidden, start_ids, unheeded

OBSERVING = "multilora-observing"
SOURCE, TARGET = 5, 3
"""Tokens of the first look, which tell the decoder's two kinds of attention apart."""
DISTANCES = 512
"""How far apart two tokens may be for a bias that still changes with their distance."""
RELATIVE_POSITIONS = 4096
"""Tokens of the longest context, where biases by distance are all the positions that there are."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderDecoder:
    """Of one base. Engine's thread only."""

    encoder: Stack
    decoder: Stack
    encoding: frozenset[nn.Module]
    """The encoder's attention modules."""
    crossing: frozenset[nn.Module]
    """The decoder's that look at the encoder's output."""
    reading: frozenset[str]
    """Linear layers that read the encoder's output, by their names in the decoder."""
    biases: Mapping[nn.Module, RelativeBias]
    """What attention modules add to scores by the distance of two tokens."""
    max_positions: int
    start_ids: tuple[int, ...]
    """What every target begins with."""
    forbidden: frozenset[int] = field(default_factory=frozenset)
    """Tokens that are never generated."""


class _Asked(NamedTuple):
    module: nn.Module
    num_queries: int
    num_keys: int
    bias: Tensor | None  # [1, heads, queries, keys]


@torch.inference_mode()
def learn_encoder_decoder(model: Any, pad_id: int | None) -> EncoderDecoder:
    """Look at a loaded encoder-decoder of transformers. Raises CannotServe. Engine's thread."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    ids = probe_ids(SOURCE, pad_id, model.device)
    memory = encoder(input_ids=ids).last_hidden_state

    def encode(tokens: Tensor) -> object:
        return encoder(input_ids=tokens)

    def decode(tokens: Tensor) -> object:
        return decoder(input_ids=tokens, encoder_hidden_states=memory, use_cache=False)

    with _observing(model) as encoding:
        encode(ids)
    with _observing(model) as decoding, _rows_of_linears(decoder) as rows:
        hidden = getattr(decode(ids[:, :TARGET]), "last_hidden_state", None)
    if hidden is None:
        raise CannotServe("shows no hidden states before its head")
    if not encoding or not decoding:
        raise CannotServe("computes attention by itself, not through transformers' attention interface")
    crossing = frozenset(asked.module for asked in decoding if asked.num_keys == SOURCE)
    if any(asked.bias is not None and asked.bias.any() for asked in decoding if asked.module in crossing):
        raise CannotServe("adds a bias by distance to its attention over the encoder's output")
    biases = {
        **_biases(model, encode, encoding, pad_id, both_ways=True),
        **_biases(model, decode, [asked for asked in decoding if asked.module not in crossing], pad_id, False),
    }
    named = (getattr(config, "max_position_embeddings", None) for config in (model.config, decoder.config))
    longest = next(filter(None, named), RELATIVE_POSITIONS if biases else 0)
    if names := unheeded(model):
        logger.warning("of this base's generation_config not carried out: %s", ", ".join(names))
    return EncoderDecoder(
        encoder=find_positions(encoder, encode, longest, pad_id),
        decoder=find_positions(decoder, decode, longest, pad_id),
        encoding=frozenset(asked.module for asked in encoding),
        crossing=crossing,
        reading=frozenset(name for name, count in rows.items() if count == SOURCE),
        biases=biases,
        max_positions=longest,
        start_ids=start_ids(model),
        forbidden=forbidden(model),
    )


@contextmanager
def _observing(model: Any) -> Iterator[list[_Asked]]:
    """Meanwhile attention computes nothing and notes who asked what."""
    seen: list[_Asked] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **named: Any
    ) -> tuple[Tensor, None]:
        seen.append(_Asked(module, query.shape[2], key.shape[2], named.get("position_bias")))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(OBSERVING, attend)
    try:
        model.set_attn_implementation(OBSERVING)
        yield seen
    finally:
        model.set_attn_implementation("eager")
        AttentionInterface.register(OBSERVING, _nobody)


def _nobody(*_arguments: Any, **_named: Any) -> tuple[Tensor, None]:
    raise RuntimeError("attention is observed outside of learn_encoder_decoder")


@contextmanager
def _rows_of_linears(stack: nn.Module) -> Iterator[dict[str, int]]:
    """How many rows each linear layer of `stack` reads meanwhile."""
    rows: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda _module, arguments: rows.__setitem__(name, arguments[0].shape[-2])

    linears = [(name, module) for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _biases(
    model: Any, run: Run, asked: Sequence[_Asked], pad_id: int | None, both_ways: bool
) -> dict[nn.Module, RelativeBias]:
    """Of those attention modules that add a bias. Raises CannotServe where it is none of the distance."""
    if all(each.bias is None for each in asked):
        return {}
    n = DISTANCES + 1
    with _observing(model) as seen:
        run(probe_ids(n, pad_id, model.device))
    own = {each.module for each in asked}
    found: dict[nn.Module, RelativeBias] = {}
    known: list[RelativeBias] = []  # layers share them
    for module, _, _, bias in seen:
        if module not in own or bias is None or not bias.any():
            continue
        before = bias[0, :, :, 0].flip(1)  # [heads, n] key 0 under queries n − 1 … 0: distances −(n − 1) … 0
        after = bias[0, :, 0, 1:] if both_ways else before[:, :0]
        table = torch.cat((before, after), 1).float().contiguous()
        same = next((each for each in known if torch.equal(each.table, table)), None)
        if same is None:
            same = RelativeBias(table, n - 1)
            _check(same, bias[0], both_ways)
            known.append(same)
        found[module] = same
    return found


def _check(learned: RelativeBias, bias: Tensor, both_ways: bool) -> None:
    """Raise CannotServe unless `bias` [heads, n, n] is `learned`, which ends in what all longer distances have."""
    n = bias.shape[1]
    places = torch.arange(n, device=bias.device)
    rebuilt = learned.between(places, places)
    seen = torch.ones_like(rebuilt, dtype=torch.bool) if both_ways else (places <= places[:, None]).expand_as(rebuilt)
    if not torch.equal(rebuilt[seen], bias.float()[seen]):
        raise CannotServe("adds a bias to its attention that is none of the distance of two tokens")
    quarter = n // 4
    ends = [learned.table[:, :quarter]] + ([learned.table[:, -quarter:]] if both_ways else [])
    if any(bool((end != end[:, :1]).any()) for end in ends):
        raise CannotServe(f"has a bias by distance that still changes beyond {n - quarter} tokens")
