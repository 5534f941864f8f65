"""Stack: an encoder or a decoder, and the module in it whose place its positions take, found by looking at it.

Knows nothing of attention, adapters or batches, and no architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.engine.positions import Positions

PLACES = 7
"""Tokens of a look in which positions are looked for; as many as there are in nothing else."""
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


def probe_ids(count: int, pad_id: int | None, device: torch.device, offset: int = 0) -> Tensor:
    """[1, count] token ids without padding."""
    usable = [token for token in range(8) if token != pad_id]
    return torch.tensor([[usable[(place + offset) % len(usable)] for place in range(count)]], device=device)


def find_positions(module: Any, run: Run, longest: int, pad_id: int | None) -> Stack:
    """`module`, and where the positions of its tokens come from; longest: tokens of its longest context, 0 where it
    counts none. Raises CannotServe."""
    first, second = (_outputs(module, run, probe_ids(PLACES, pad_id, _device(module), offset)) for offset in (0, 1))
    found = [name for name, out in first.items() if _is_positions(out, second.get(name), module.config)]
    if not found or not longest:
        return Stack(module, None, "")
    place = found[0]
    if len(found) > 1 and not all(name.startswith(f"{place}.") for name in found[1:]):
        raise CannotServe(f"has several sources of positions: {', '.join(found)}")
    table = _output_of(module, place, run, probe_ids(longest, pad_id, _device(module)))
    rule = Positions()
    if pad_id is not None and longest > PLACES:
        ids = probe_ids(PLACES, pad_id, _device(module))
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
