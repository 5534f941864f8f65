"""Random schedules of all that can happen to adapters: everything is accounted for after each step, and at the end.

Store, directory, registry, tiers, scheduler and pages are the real ones, on checkpoints of a small base; only the
forward pass is left out: results are made up.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.adapter import Limits
from adapters.catalog import AdapterCatalog, reader
from adapters.directory import scan
from adapters.errors import AdapterError
from adapters.host_tier import HostLimits
from adapters.registry import AdapterRegistry
from adapters.slots import LoraSlots
from adapters.store import AdapterStore
from adapters.version import AdapterVersion
from server.engine.block_manager import BlockManager
from server.engine.request import CAUSAL_LM, SEQ_CLS, RowResult, SamplingParams, Sequence, SequenceStatus
from server.engine.scheduler import Scheduler
from tests.adapters_support import save_small, small_base

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
CONTENTS = st.integers(0, 5)
MAX_CPU_LORAS = 3


class Adapters(RuleBasedStateMachine):
    """What clients, operators and the engine do to a server's adapters."""

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.directory = self.root / "adapters"
        self.directory.mkdir()
        self.sequences: list[Sequence] = []
        self.acknowledged: dict[str, str | None] = {}
        """Name -> digest that must be served, as the last change that was acknowledged left it; None: none."""
        self._open()

    def _open(self) -> None:
        body, layout = small_base()
        limits = Limits()
        host = HostLimits(MAX_CPU_LORAS, 1 << 20, threads=1)
        self.registry = AdapterRegistry(LoraSlots(body, layout, 2), host, ("base",), reader(layout, limits))
        self.scheduler = Scheduler(BlockManager(24, 4), self.registry, 4, 16, fairness_tokens=20)
        store = AdapterStore(self.root / "store", keep_versions=2)
        self.catalog = AdapterCatalog(self.registry, store, layout, limits, self.directory)
        self.catalog.open()

    # What clients and operators do

    @rule(name=NAMES, content=CONTENTS)
    def upload(self, name: str, content: int) -> None:
        staged = save_small(self.catalog.store.stage(), content)
        version, _ = self.catalog.publish(name, staged)
        self.acknowledged[name] = version.digest

    @rule(name=NAMES, content=CONTENTS, broken=st.booleans())
    def drop_in(self, name: str, content: int, broken: bool) -> None:
        path = save_small(self.directory / name, content)
        if broken:
            (path / "adapter_config.json").write_text("{}")
        self.catalog.changed(name, scan(self.directory)[name])
        if not broken:
            self.acknowledged[name] = self.registry.current(name).digest
        elif name not in {n for n, _ in self.registry.list()}:
            self.acknowledged[name] = None

    @rule(name=NAMES)
    def take_away(self, name: str) -> None:
        shutil.rmtree(self.directory / name, ignore_errors=True)
        self.catalog.gone(name)
        served = dict(self.registry.list()).get(name)
        self.acknowledged[name] = served.info.digest if served else None

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        try:
            self.catalog.remove(name)
        except AdapterError:
            assert self.acknowledged.get(name) is None
        self.acknowledged[name] = None

    @rule(name=NAMES, which=st.integers(0, 1))
    def roll_back(self, name: str, which: int) -> None:
        versions = self.catalog.versions(name)
        if which < len(versions):
            try:
                version = self.catalog.rollback(name, versions[which].info.digest)
            except AdapterError:
                assert self.acknowledged.get(name) is None
            else:
                self.acknowledged[name] = version.digest

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        with suppress(AdapterError):
            self.catalog.pin(name, pinned)

    @rule(
        name=NAMES, prompt=st.integers(1, 30), tokens=st.integers(1, 20), one_step=st.booleans(), old=st.booleans(),
        priority=st.integers(-1, 1),
    )  # fmt: skip
    def request(self, name: str, prompt: int, tokens: int, one_step: bool, old: bool, priority: int) -> None:
        try:
            if old:
                stored = self.catalog.versions(name)
                version = self.registry.acquire_version(
                    name, *self.catalog.find(name, stored[-1].info.digest if stored else "none")
                )
            else:
                version = self.registry.acquire(name)
                assert version.digest == self.acknowledged[name]
        except AdapterError:
            return
        params = None if one_step else SamplingParams(max_tokens=tokens)
        task = SEQ_CLS if one_step else CAUSAL_LM
        sequence = Sequence(len(self.sequences), task, [1] * prompt, version, params, priority=priority)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    @rule(prompt=st.integers(1, 30))
    def request_the_base(self, prompt: int) -> None:
        params = SamplingParams(max_tokens=5)
        self.sequences.append(Sequence(len(self.sequences), CAUSAL_LM, [1] * prompt, None, params))
        self.scheduler.add(self.sequences[-1])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.end(data.draw(st.sampled_from(self.sequences)), SequenceStatus.ABORTED)

    # What the engine does

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @rule(rarely=st.integers(0, 7))
    def restart(self, rarely: int) -> None:
        if rarely:
            return
        for sequence in self.scheduler.unfinished():
            self.scheduler.end(sequence, SequenceStatus.ABORTED)
        self._close()
        self._open()
        assert self.catalog.store.audit() == []
        for name in self.catalog.unread():
            reading = self.registry.read_first(name)
            assert reading is not None
            reading.result(30)
        served = {name: entry.info.digest for name, entry in self.registry.list()}
        expected = {name: digest for name, digest in self.acknowledged.items() if digest is not None}
        for name in self.registry.refused():  # what was in memory only is gone, what was uploaded before is not
            stored = self.catalog.store.current(name)
            expected.pop(name, None)
            expected |= {name: stored.digest} if stored else {}
        assert served == expected
        self.acknowledged = dict.fromkeys(self.acknowledged) | served

    def _step(self) -> bool:
        """Whether there was anything to run."""
        self.registry.place_pinned()
        batch = self.scheduler.schedule()
        self.scheduler.refused()
        results = {item.sequence.id: RowResult(token_id=5) for item in batch.items if item.completes}
        self.scheduler.postprocess(batch, results)
        return bool(batch.items)

    def _settle(self) -> None:
        """Until no read is under way, so that a schedule goes the same way each time."""
        while self.registry.host._loading:
            self.registry.host.submit(lambda: None).result(30)

    def _close(self) -> None:
        self._settle()
        self.scheduler.check_integrity()
        self.registry.host.close()
        self.catalog.store.close()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "registry"):
            return
        self._settle()
        self.scheduler.check_integrity()
        assert len(self.registry.host) <= MAX_CPU_LORAS
        served = {name: entry.info.digest for name, entry in self.registry.list()}
        assert served == {name: digest for name, digest in self.acknowledged.items() if digest is not None}

    def teardown(self) -> None:
        if not hasattr(self, "registry"):
            return
        idle = 0
        while self.scheduler.unfinished():
            idle = 0 if self._step() else idle + 1
            self._settle()
            assert idle < 5, "sequences wait, and nothing runs"
        assert all(sequence.status.ended for sequence in self.sequences)
        for name in {*(name for name, _ in self.registry.list()), *self.registry.refused()}:
            self.catalog.remove(name)
        self.scheduler.check_integrity()
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks
        assert (len(self.registry.host), self.registry.device.num_used) == (0, 0)
        assert not [v for v in self.registry._versions.values() if isinstance(v, AdapterVersion)]
        self.catalog.collect()
        assert self.catalog.store.audit() == []
        assert list((self.root / "store" / "versions").iterdir()) == []
        self._close()
        shutil.rmtree(self.root)


def test_a_refused_name_with_a_stored_version_is_removed_too() -> None:
    """Found at random: what lay in memory alone makes room, and the store still holds what was uploaded before it."""
    adapters = Adapters()
    adapters.start()
    adapters.upload("e", 0)
    adapters.upload("a", 0)
    adapters.pin("e", True)
    adapters.drop_in("a", 4, False)
    adapters.upload("d", 5)
    adapters.upload("c", 2)
    adapters.drop_in("a", 1, True)
    adapters.everything_is_accounted_for()
    adapters.teardown()


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(
    max_examples=80, stateful_step_count=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
