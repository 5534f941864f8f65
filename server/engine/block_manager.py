"""BlockManager: which KV-cache pages are free and which sequence has which. Accounting only; no tensors."""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.request import Sequence


class BlockManager:
    """Pages of `block_size` tokens. Engine's thread only."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._fresh: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` pages for its first `num_tokens` tokens; False, changing nothing, when too few are free."""
        missing = -(-sequence.num_places(num_tokens) // self.block_size) - len(sequence.pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            sequence.pages.append(self._free.pop())
        if missing > 0:  # the target comes to pages one by one that its source has filled
            self._fresh += sequence.pages[-missing:] if sequence.source_ids else sequence.pages[-1:]
        return True

    def take_fresh(self) -> tuple[int, ...]:
        """Pages handed out since the last call that will be read before they are full: each sequence's last one, or all
        where a target grows beside its source."""
        fresh, self._fresh = tuple(self._fresh), []
        return fresh

    def free(self, sequence: Sequence) -> None:
        """Take all pages back."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages.clear()

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every page is free or held by exactly one of `holders`."""
        held = [page for sequence in holders for page in sequence.pages]
        assert sorted(held + self._free) == list(range(self.num_blocks)), "a KV-cache page is lost or held twice"
