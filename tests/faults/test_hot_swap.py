"""Adapters are replaced while 32 clients ask: each answer is one version's alone, none is lost, nothing stays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from adapters.version import AdapterVersion
from benchmarks.hot_swap import HotSwap, Question, Swapped
from tests.support import CORPUS, Live, Spec, live_server, make_adapter, service_for

REPLACEMENTS = 10
NEW_TOKENS = 12
GENERATING = [
    Question("chat", "the quick fox", NEW_TOKENS),
    Question("chat", CORPUS[0], NEW_TOKENS),
    Question("complete", "user: 0123", NEW_TOKENS),
    Question("complete", "the lazy dog jumps", NEW_TOKENS),
]
CLASSIFYING = [Question("classify", text) for text in ("the fox", CORPUS[0], CORPUS[1])]
SPECS = [
    Spec("a0", "CAUSAL_LM", 4, ["q_proj", "v_proj"]),
    Spec("a1", "CAUSAL_LM", 8, "all-linear"),
    Spec("a2", "CAUSAL_LM", 8, ["up_proj", "down_proj"]),
    Spec("a3", "CAUSAL_LM", 2, ["o_proj"]),
    Spec("a4", "CAUSAL_LM", 16, ["q_proj", "k_proj", "v_proj"]),
    Spec("a5", "CAUSAL_LM", 4, "all-linear"),
    Spec("s0", "SEQ_CLS", 8, ["q_proj", "v_proj"], labels=3),
    Spec("s1", "SEQ_CLS", 4, "all-linear", labels=5),
]


@pytest.fixture(params=[8, 4], ids=["a slot for each", "half as many slots"])
def live(request: pytest.FixtureRequest, base_location: dict[str, str]) -> Iterator[Live]:
    """A server whose slots, and in the second case host memory too, are too few for what is held meanwhile."""
    room = {8: {"max_loras": 8}, 4: {"max_loras": 4, "max_cpu_loras": 6, "fairness_tokens": 64}}[request.param]
    service = service_for(base_location["tiny-llama"], "tiny", keep_versions=REPLACEMENTS + 1, **room)
    with live_server(service) as running:
        yield running


def test_every_answer_is_one_versions_own(live: Live, base_location: dict[str, str], tmp_path: Path) -> None:
    adapters = []
    for spec in SPECS:
        checkpoint = make_adapter(base_location["tiny-llama"], tmp_path, spec)
        adapters.append(Swapped.of(spec.name, checkpoint, CLASSIFYING if spec.labels else GENERATING))
    swap = HotSwap(live.url, adapters)
    swap.run(REPLACEMENTS)
    assert [len(a.digests) for a in adapters] == [REPLACEMENTS + 1] * len(SPECS)
    assert_only_current_versions_are_left(live, adapters)

    judgement = swap.judge()
    assert judgement.answers >= len(SPECS) * REPLACEMENTS
    assert judgement.wrong == []
    assert judgement.untimely == []
    assert judgement.ambiguous == [], "an answer that two versions give shows nothing"
    assert judgement.late, "no adapter was replaced under a request"
    assert_only_current_versions_are_left(live, adapters)


def assert_only_current_versions_are_left(live: Live, adapters: list[Swapped]) -> None:
    """Every slot, page, byte and reference is accounted for, on the device, in memory and on the disk."""
    service = live.service
    engine, registry = service.async_engine.engine, service.registry
    versions = {adapter.name: registry.current(adapter.name) for adapter in adapters}
    asyncio.run_coroutine_threadsafe(_released(versions.values()), live.loop).result(60)
    engine.scheduler.check_integrity()
    assert service.lifecycle.catalog.store.audit() == []
    assert {name: version.digest for name, version in versions.items()} == {a.name: a.digests[-1] for a in adapters}
    assert all(version.holders == version.expected == 0 for version in versions.values())
    assert not any(registry.in_use(digest) for adapter in adapters for digest in adapter.digests[:-1])
    in_host = [version.adapter.nbytes for version in versions.values() if version.adapter is not None]
    assert registry.host.num_bytes == sum(in_host)
    assert len(registry.host) == len(in_host)
    assert len(in_host) >= service.config.max_loras


async def _released(versions: Iterable[AdapterVersion]) -> None:
    """Until the requests have let go: a streaming one does a moment after its client has read the end."""
    while any(version.holders for version in versions):
        await asyncio.sleep(0)
