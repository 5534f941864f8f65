"""EncoderDecoder: what is learned at start of a base with an encoder and a decoder, from the base itself.

Knows nothing of adapters or batches, and no architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from server.engine.attention import RelativeBias
from server.engine.positions import Positions

OBSERVING = "multilora-observing"
SOURCE, TARGET = 5, 3
"""Tokens of the first look, which tell the decoder's two kinds of attention apart."""
PLACES = 7
"""Tokens of the second, in which positions are looked for; as many as there are in nothing else."""
DISTANCES = 512
"""How far apart two tokens may be for a bias that still changes with their distance."""
RELATIVE_POSITIONS = 4096
"""Tokens of the longest context, where biases by distance are all the positions that there are."""
Run = Callable[[Tensor], object]
"""A forward pass of one stack over token ids [1, n]."""


class CannotServe(Exception):
    """What was learned cannot be served; the message says why."""


class PositionRows(nn.Module):
    """In the place of a module that makes position vectors: those of the current packed row."""

    def __init__(self, table: Tensor, rule: Positions) -> None:
        """table: [n, d] by position, as `rule` counts it."""
        super().__init__()
        self.table = table
        self.rule = rule
        self.current: Tensor | None = None
        """[1, T] int64, set before each pass."""

    def forward(self, *_arguments: Any, **_named: Any) -> Tensor:
        """[1, T, d]."""
        assert self.current is not None
        return F.embedding(self.current, self.table)


@dataclass(frozen=True)
class Stack:
    """The encoder or the decoder."""

    module: nn.Module
    positions: PositionRows | None
    """Where the positions of its tokens enter; None: by biases only."""
    place: str
    """Name of what `positions` takes the place of, in `module`."""

    def enter(self) -> None:
        """From now on `positions` stands in the model."""
        if self.positions is not None:
            self.module.set_submodule(self.place, self.positions)


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
    ids = _ids(SOURCE, pad_id, model.device)
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
    return EncoderDecoder(
        encoder=_stack(encoder, encode, longest, pad_id),
        decoder=_stack(decoder, decode, longest, pad_id),
        encoding=frozenset(asked.module for asked in encoding),
        crossing=crossing,
        reading=frozenset(name for name, count in rows.items() if count == SOURCE),
        biases=biases,
        max_positions=longest,
        start_ids=_start_ids(model),
        forbidden=_forbidden(model),
    )


def _ids(count: int, pad_id: int | None, device: torch.device, offset: int = 0) -> Tensor:
    """[1, count] token ids without padding."""
    usable = [token for token in range(8) if token != pad_id]
    return torch.tensor([[usable[(place + offset) % len(usable)] for place in range(count)]], device=device)


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
        run(_ids(n, pad_id, model.device))
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


def _stack(module: Any, run: Run, longest: int, pad_id: int | None) -> Stack:
    """`module`, and where the positions of its tokens come from."""
    first, second = (_outputs(module, run, _ids(PLACES, pad_id, _device(module), offset)) for offset in (0, 1))
    found = [name for name, out in first.items() if _is_positions(out, second.get(name), module.config)]
    if not found or not longest:
        return Stack(module, None, "")
    place = found[0]
    if len(found) > 1 and not all(name.startswith(f"{place}.") for name in found[1:]):
        raise CannotServe(f"has several sources of positions: {', '.join(found)}")
    table = _output_of(module, place, run, _ids(longest, pad_id, _device(module)))
    rule = Positions()
    if pad_id is not None and longest > PLACES:
        ids = _ids(PLACES, pad_id, _device(module))
        ids[0, 1] = pad_id
        rows = _output_of(module, place, run, ids)
        if not torch.equal(rows[2], table[2]):  # padding is not counted
            table, rule = torch.cat((rows[1:2], table)), Positions(1, pad_id)
    return Stack(module, PositionRows(table.contiguous(), rule), place)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _is_positions(out: Tensor, again: Tensor | None, config: Any) -> bool:
    """Whether a module's output is a vector for each place, whatever the tokens."""
    if out.dim() < 2 or out.shape[-2:] != (PLACES, config.hidden_size) or out.numel() != PLACES * config.hidden_size:
        return False
    return again is not None and torch.equal(out, again) and not torch.equal(out[..., :1, :].expand_as(out), out)


def _outputs(stack: nn.Module, run: Run, ids: Tensor) -> dict[str, Tensor]:
    """What each module of `stack` gives."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _m, _a, out: outputs.__setitem__(name, out.clone()) if isinstance(out, Tensor) else None

    hooks = [module.register_forward_hook(note(name)) for name, module in stack.named_modules() if name]
    try:
        run(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


class _Found(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _output_of(stack: nn.Module, name: str, run: Run, ids: Tensor) -> Tensor:
    """[n, d] of one module, without the rest of the pass."""

    def stop(_module: nn.Module, _arguments: Any, out: Tensor) -> None:
        raise _Found(out.view(ids.shape[1], -1).clone())

    hook = stack.get_submodule(name).register_forward_hook(stop)
    try:
        run(ids)
    except _Found as found:
        return found.output
    finally:
        hook.remove()
    raise CannotServe(f"does not ask {name!r} for the positions of every input")


def _start_ids(model: Any) -> tuple[int, ...]:
    """As `generate` begins, with a token that is forced to come first."""
    chosen = []
    for name in ("decoder_start_token_id", "forced_bos_token_id"):
        value = getattr(model.generation_config, name, None)
        chosen.append(getattr(model.config, name, None) if value is None else value)
    start, forced = chosen
    if start is None:
        raise CannotServe("names no token that a target starts with (decoder_start_token_id)")
    return (start,) if forced is None else (start, forced)


def _forbidden(model: Any) -> frozenset[int]:
    """Single tokens that `generate` never gives."""
    generation = model.generation_config
    words = [word for word in generation.bad_words_ids or [] if len(word) == 1]
    return frozenset([word[0] for word in words] + list(generation.suppress_tokens or []))
