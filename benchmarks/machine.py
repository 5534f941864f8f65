"""What this machine can do at this moment: its peak in fp32 products and its memory's bandwidth. And what a base needs.

Both are measured again in every round, beside what is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from adapters.adapter import Adapter
from adapters.kernels import load_library
from adapters.memory import LargePages
from adapters.packed import PackedLinear, can_pack
from adapters.products import NativeLinear
from benchmarks.common import seconds
from server.engine.engine import Engine

READ_BYTES = 1 << 30
SQUARES = (1024, 2048)
NATIVE_ROWS = 1024
NATIVE_SHAPES = ((576, 1536), (1536, 576), (2048, 2048))
EXACT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Machine:
    """The fastest known way to multiply and to read, found once and asked again and again."""

    def __init__(self) -> None:
        self._memory = LargePages(READ_BYTES).empty(READ_BYTES // 8, torch.int64)
        self._memory.fill_(1)  # else every page is the same page of zeros
        self._multiply, self._flop, self.best_product = max(_products(), key=lambda p: p[1] / _best(p[0], 5))

    def bandwidth(self) -> float:
        """Bytes a second, reading 1 GB with all threads."""
        floats = self._memory.view(torch.float32)
        return READ_BYTES / min(_best(self._memory.sum, 2), _best(floats.sum, 1))

    @torch.inference_mode()
    def peak(self) -> float:
        """Floating-point operations a second in fp32."""
        return self._flop / _best(self._multiply, 3)


def _products() -> list[tuple[Callable[[], object], float, str]]:
    """(product, operations, name): torch, oneDNN on packed weights, and our own kernels."""
    found: list[tuple[Callable[[], object], float, str]] = []
    library = load_library()
    for n in SQUARES:
        x, linear = torch.rand(n, n), nn.Linear(n, n, bias=False).requires_grad_(False)
        found.append((partial(torch.mm, x, linear.weight), 2.0 * n**3, f"torch.mm {n}³"))
        if can_pack(linear):
            found.append((partial(PackedLinear(linear), x), 2.0 * n**3, f"oneDNN packed {n}³"))
    for d_in, d_out in NATIVE_SHAPES if library else ():
        assert library is not None
        x = torch.rand(NATIVE_ROWS, d_in)
        own = NativeLinear(library, nn.Linear(d_in, d_out, bias=False), LargePages())
        name = f"our kernel {NATIVE_ROWS} × {d_in} × {d_out}"
        found.append((partial(own, x), 2.0 * NATIVE_ROWS * d_in * d_out, name))
    return found


@torch.inference_mode()
def _best(run: Callable[[], object], times: int) -> float:
    return min(seconds(run) for _ in range(times))


def base_needs(model: nn.Module) -> tuple[float, float]:
    """(operations for one token with its logits, bytes of all weights in the narrowest dtype that is exact).

    Before the engine patches `model`. Without attention over the context, and without the pages that it reads.
    """
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    flop = sum(2.0 * w.numel() for w in weights)
    return flop, float(sum(w.numel() * _exact_itemsize(w) for w in weights))


def _exact_itemsize(weight: torch.Tensor) -> int:
    return next(d.itemsize for d in EXACT_DTYPES if torch.equal(weight.to(d).float(), weight))


def factor_bytes(engine: Engine, names: list[str | None]) -> float:
    """Bytes of A and B of the distinct adapters in `names`: what one step must read of them."""

    def size(adapter: Adapter | None) -> int:
        assert adapter is not None, "its factors are in no memory"
        return sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.pairs.values())

    return float(sum(size(engine.registry.current(name).adapter) for name in sorted({n for n in names if n})))
