"""The padded pass: as many of them as there are adapters in the batch. That it is exact is in the base matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.engine.padded import PASS_TOKENS, _passes
from server.engine.request import FEATURE_EXTRACTION
from tests.bases import PADDED_ENCODERS, VOCABULARY
from tests.support import Runner, Spec, make_adapter, random_ids


def test_sequences_of_one_adapter_share_a_pass(tmp_path: Path) -> None:
    location = PADDED_ENCODERS[0].save(tmp_path / "base")
    runner = Runner(location)
    for rank in (2, 4):
        runner.load(make_adapter(location, tmp_path, Spec(f"rank-{rank}", FEATURE_EXTRACTION, rank, "all-linear")))
    shapes: list[tuple[int, ...]] = []

    def note(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        shapes.append(tuple(named["input_ids"].shape))
        assert named["attention_mask"].sum() < named["input_ids"].numel()

    runner.base.body.register_forward_pre_hook(note, with_kwargs=True)
    for n in (5, 11, 7):
        for name in (None, "rank-2", "rank-4"):
            runner.submit(FEATURE_EXTRACTION, random_ids(n, n, VOCABULARY), name)
    runner.drain()
    assert len(runner.engine.steps) == 1
    assert shapes == [(3, 11)] * 3


def test_a_pass_is_of_similar_lengths_and_bounded() -> None:
    """One long text beside many short ones would else be padded times the long one's length."""
    lengths = {0: 1000, **dict.fromkeys(range(1, 100), 10), 100: 5000}
    groups = [*_passes(lengths)]
    assert sorted(key for group in groups for key in group) == sorted(lengths)
    assert groups[-1] == [100], "longer than the bound, and alone"
    for group in groups[:-1]:
        assert len(group) * max(lengths[key] for key in group) <= PASS_TOKENS
    assert len(groups) == 3
