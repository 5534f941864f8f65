"""Decode steps as graphs give the tokens of eager ones: Triton's interpreter, and a recorder in CUDA's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from server.config import InvalidConfig, ServerConfig
from server.engine import decode_graphs
from server.engine import engine as engine_module
from server.engine.async_engine import AsyncEngine, EngineState
from server.engine.attention import Span
from server.engine.base_model import UnsupportedBase, load_base
from server.engine.decode_graphs import (
    GRAPH,
    PROMPT,
    TASK,
    WARM_UPS,
    CudaCapture,
    Inputs,
    choose_capture,
    sizes_up_to,
)
from server.engine.device import DeviceNotAvailable
from server.engine.engine import Engine
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SamplingParams
from server.engine.self_test import probe_blocks
from server.gauges import add_gauges
from server.metrics import Metrics
from server.service import Service
from tests.bases import DECODERS, ENCODER_DECODERS, ENCODERS, GROUPED, VOCABULARY, TinyBase
from tests.recorded_graphs import CannotRecord, RecordedGraphs
from tests.support import Runner, Spec, make_adapter, random_ids, relative
from tests.triton_support import interpreted

pytest.importorskip("triton")

Launchers = tuple[ModuleType, ModuleType]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BASES = {base.name: base for base in DECODERS}
BASES_BY_KIND = {"encoder": ENCODERS[0], "encoder-decoder": ENCODER_DECODERS[0]}
SMALL = TinyBase("Llama of one layer", lambda: LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}))
"""Each program of a kernel takes milliseconds in the interpreter."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPECS = [
    Spec("some", CAUSAL_LM, 4, ["q_proj", "v_proj"]),
    Spec("all", CAUSAL_LM, 8, LINEARS),
    Spec("rank-1", CAUSAL_LM, 1, ["down_proj"]),
    Spec("rank-5", CAUSAL_LM, 5, ["o_proj", "up_proj"], options={"use_rslora": True}),
    Spec("dora", CAUSAL_LM, 8, ["q_proj", "up_proj"], options={"use_dora": True}),
    Spec("token_layers", CAUSAL_LM, 4, ["q_proj", "lm_head"]),
]
SETTINGS = {
    "max_loras": 3, "max_lora_rank": 8, "max_num_seqs": 3, "lora_dtype": "float32", "pack_weights": False,
    "block_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def launchers() -> Iterator[Launchers]:
    """triton_lora and triton_attention, their kernels in the interpreter."""
    with (
        interpreted("adapters.kernels.triton_kernels", "adapters.kernels.triton_lora") as lora,
        interpreted("server.engine.triton_attention_kernel", "server.engine.triton_attention") as attention,
    ):
        yield lora, attention


class GraphRunner(Runner):
    """An engine on Triton's kernels whose decode steps are recorded graphs."""

    def __init__(self, launchers: Launchers, location: Path, **settings: Any) -> None:
        lora, attention = launchers
        kernels = ((lora, ("shrink_kernel", "expand_kernel")), (attention, ("attend_kernel",)))
        self.recorded = RecordedGraphs(kernels)

        def backend(config: ServerConfig, *_: object) -> Any:
            return attention.TritonAttention(probe_blocks(config.block_size), config.block_size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "choose_kernel", lambda *a: lora.TritonLora(CPU, torch.float32, a[3]))
            patch.setattr(engine_module, "_attention", backend)
            patch.setattr(engine_module, "choose_capture", lambda base: self.recorded)
            super().__init__(location, cuda_graphs=True, **{**SETTINGS, **settings})
        self.recorded.replays = 0

    @property
    def steps(self) -> dict[str, int]:
        """How many ran as a graph, and how many did not."""
        graphs = self.engine.runner.graphs
        assert graphs is not None
        assert graphs.steps[GRAPH] == self.recorded.replays
        return graphs.steps


Row = tuple[str | None, int, int]
"""Adapter, length of the prompt, tokens to generate."""


def tokens(runner: Runner, rows: Sequence[Row]) -> list[list[int]]:
    """What these rows generate, greedily."""
    sequences = []
    for i, (name, length, count) in enumerate(rows):
        params = SamplingParams(max_tokens=count, min_tokens=count, temperature=0.0)
        sequences.append(runner.submit(CAUSAL_LM, random_ids(length, i, VOCABULARY), name, params))
    runner.drain()
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.parametrize("base", [BASES[name] for name in ("Gemma 2", "GPT-2")], ids=lambda base: base.name)
def test_same_tokens_on_other_bases(launchers: Launchers, base: TinyBase, tmp_path: Path) -> None:
    """Windows and soft caps, layers that lie transposed, learned positions; an adapter's row and the base's."""
    location = base.save(tmp_path / "base")
    checkpoint = make_adapter(location, tmp_path, Spec("all", CAUSAL_LM, 8, base.targets, options=base.lora))
    rows: list[Row] = [("all", 6, 5), (None, 3, 3)]
    results = []
    for runner in (GraphRunner(launchers, location, max_num_seqs=2), Runner(location)):
        runner.load(checkpoint)
        results.append(tokens(runner, rows))
        if isinstance(runner, GraphRunner):
            assert runner.steps == {PROMPT: 1, GRAPH: 4}
    assert results[0] == results[1]


@dataclass
class Served:
    """One small base, by graphs and as the CPU serves it, with the same adapters."""

    graphs: GraphRunner
    plain: Runner

    def both(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]], dict[str, int]]:
        """The tokens of either, and how the graphs' steps ran."""
        self.graphs.engine.steps.clear()
        before = dict(self.graphs.steps)
        got = tokens(self.graphs, rows)
        ran = {name: count - before.get(name, 0) for name, count in self.graphs.steps.items()}
        return got, tokens(self.plain, rows), {name: count for name, count in ran.items() if count}


@pytest.fixture(scope="module")
def served(launchers: Launchers, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("graphs")
    location = SMALL.save(folder / "base")
    runners = GraphRunner(launchers, location), Runner(location)
    for spec in SPECS:
        checkpoint = make_adapter(location, folder, spec)
        for runner in runners:
            runner.load(checkpoint)
    return Served(*runners)


def test_batches_that_grow_and_shrink(served: Served) -> None:
    """More sequences than run at once; every graph serves, and one of three rows has two adapters and a base row."""
    got, expected, ran = served.both([("all", 5, 5), (None, 6, 12), ("some", 1, 4), ("all", 3, 3), (None, 4, 5)])
    assert got == expected
    assert len({tuple(row) for row in got}) == len(got)
    assert ran.keys() == {PROMPT, GRAPH}
    decodes = [step for step in served.graphs.engine.steps if set(step.counts) == {1} and len(step.counts) < 4]
    assert {len(step.slots) for step in decodes} == {1, 2, 3}
    assert any(len(set(step.slots)) == 3 for step in decodes)


def test_steps_without_adapters_launch_no_kernel_for_them(served: Served) -> None:
    """Captured largest first, with adapters and without; an attention program for each row and key head."""
    tapes = iter(served.graphs.recorded.tapes)
    for size in (3, 2, 1):
        adapted, plain = next(tapes).launches, next(tapes).launches
        assert plain == [("attend_kernel", (size, 2))]
        assert [launch for launch in adapted if launch in plain] == plain
        assert [name for name, _ in adapted].count("shrink_kernel") == 4, "q, k and v; o; gate and up; down"
    assert next(tapes, None) is None


def test_slots_change_hands_between_replays(served: Served) -> None:
    """Three slots, five adapters of several ranks and targets; a step of one adapter, and of the base alone."""
    for rows in (
        [("all", 4, 2)],
        [("rank-1", 4, 2)],
        [("some", 4, 2)],
        [("rank-5", 4, 2)],
        [(None, 4, 2)],
        [("all", 4, 2)],
    ):
        got, expected, ran = served.both(rows)
        assert got == expected, rows
        assert ran == {PROMPT: 1, GRAPH: 1}


@pytest.mark.parametrize("name", ["dora", "token_layers"])
def test_what_graphs_do_not_know_runs_eagerly(served: Served, name: str) -> None:
    """And the others' steps are graphs although such an adapter is in a slot."""
    got, expected, ran = served.both([(name, 3, 3), ("all", 4, 5)])
    assert got == expected
    assert ran == {PROMPT: 1, name: 2, GRAPH: 2}
    assert name in served.graphs.engine.slots.beside


def test_biases_of_norms_run_eagerly(tmp_path: Path) -> None:
    """Each norm adds them adapter by adapter."""
    base = BASES["GPT-2"]
    location = base.save(tmp_path / "base")
    runner = Runner(location)
    runner.load(
        make_adapter(location, tmp_path, Spec("biases", CAUSAL_LM, 4, ["c_attn"], options={**base.lora, "bias": "all"}))
    )
    runner.submit(CAUSAL_LM, [5, 6, 7], "biases")
    runner.drain()
    slots = runner.engine.slots
    assert slots.beside.count("norm_biases") == 1
    slots.clear(slots.beside.index("norm_biases"))
    assert not any(slots.beside)


def test_other_tasks_run_eagerly(served: Served) -> None:
    graphs = served.graphs
    before = graphs.steps[TASK]
    embedded = graphs.submit(FEATURE_EXTRACTION, random_ids(5, 0, VOCABULARY))
    same = served.plain.submit(FEATURE_EXTRACTION, random_ids(5, 0, VOCABULARY))
    graphs.drain()
    served.plain.drain()
    assert relative(graphs.values(embedded), served.plain.values(same)) < 1e-4
    assert graphs.steps[TASK] == before + 1


def test_sampled_rows_and_their_logprobs(served: Served) -> None:
    """Sampling writes into the logits; a graph's are written anew by each replay."""
    rows = []
    for runner in (served.graphs, served.plain):
        params = SamplingParams(max_tokens=5, min_tokens=5, temperature=0.9, seed=3, repetition_penalty=1.3, logprobs=2)
        sequence = runner.submit(CAUSAL_LM, random_ids(5, 1, VOCABULARY), "all", params)
        runner.drain()
        told = [output.logprobs for output in runner.outputs[sequence.id]]
        rows.append((sequence.output_ids, [entry.logprob for entry in told if entry is not None]))
    assert rows[0][0] == rows[1][0]
    assert len(rows[0][1]) == 5
    assert rows[0][1] == pytest.approx(rows[1][1], abs=1e-4)


def test_preempted_sequences_go_on(launchers: Launchers, tmp_path: Path) -> None:
    location = SMALL.save(tmp_path / "base")
    plain = Runner(location, block_size=4)
    page_bytes = plain.engine.cache.bytes_per_block
    runner = GraphRunner(launchers, location, kv_cache_bytes=7 * page_bytes, max_num_seqs=2)
    assert runner.engine.scheduler.blocks.num_blocks == 6, "the last page is the padding's"
    rows: list[Row] = [(None, 9, 7), (None, 8, 7)]
    assert tokens(runner, rows) == tokens(plain, rows)
    assert runner.engine.scheduler.preemptions > 0


def test_metrics_count_steps_by_how_they_ran(served: Served) -> None:
    served.both([("all", 3, 2), ("dora", 3, 2)])
    metrics, engine = Metrics(), AsyncEngine(lambda: served.graphs.engine, 1)
    add_gauges(metrics, engine, 3)
    assert "cuda_graph_steps_total{" not in metrics.text().decode()
    engine._engine, engine.state = served.graphs.engine, EngineState.READY
    lines = [line for line in metrics.text().decode().splitlines() if "cuda_graph_steps_total{" in line]
    steps = served.graphs.steps
    assert {GRAPH, PROMPT, "dora"} <= steps.keys()
    assert lines == [f'multilora:cuda_graph_steps_total{{ran="{ran}"}} {steps[ran]}.0' for ran in steps]


# what is refused


def test_a_base_that_looks_at_numbers_is_refused(
    launchers: Launchers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        return original(self, x) if x.isfinite().all() else x

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(UnsupportedBase, match=r"cannot be captured as CUDA graphs: .* waits for the device"):
        GraphRunner(launchers, SMALL.save(tmp_path / "base"), max_num_seqs=1)


def test_graphs_that_give_something_else_are_refused(
    launchers: Launchers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they were captured with a position that the host knew."""
    monkeypatch.setattr(decode_graphs, "Inputs", Baked)
    with pytest.raises(UnsupportedBase, match="as a CUDA graph differs"):
        GraphRunner(launchers, SMALL.save(tmp_path / "base"), max_num_seqs=1)


class Baked(Inputs):
    """Inputs whose positions stay those of the capture."""

    def write(self, values: Mapping[str, Any]) -> None:
        super().write({**values, "positions": np.zeros_like(values["positions"])})


def test_where_graphs_are_refused(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"device": "cpu"}, {"kernel": "torch"}, {"kernel": "native"}]
    for wrong in settings:
        with pytest.raises(InvalidConfig, match="cuda_graphs"):
            ServerConfig(cuda_graphs=True, **wrong)
    location = SMALL.save(tmp_path / "base")
    base = load_base(str(location))
    with pytest.raises(UnsupportedBase, match="needs an NVIDIA GPU"):
        Engine(ServerConfig(cuda_graphs=True), base, "base")
    for other in (BASES_BY_KIND["encoder"], BASES_BY_KIND["encoder-decoder"]):
        with pytest.raises(UnsupportedBase, match="steps of a decoder"):
            choose_capture(replace(other.wrap(), device=CUDA))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_server_without_a_gpu_says_so_before_it_loads(base_location: dict[str, str]) -> None:
    service = Service(ServerConfig(base=base_location["tiny-llama"], cuda_graphs=True))
    with pytest.raises(DeviceNotAvailable, match="cuda_graphs needs an NVIDIA GPU"):
        service._load_configured()


# parts


def test_sizes() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(20) == [1, 2, 4, 8, 16, 20]


def test_inputs_are_views_of_one_buffer() -> None:
    inputs = Inputs({"a": ((1, 3), torch.int64), "b": ((2, 5), torch.int32), "c": ((7,), torch.int32)}, CPU)
    assert all(view.data_ptr() % 16 == 0 for view in inputs.views.values())
    assert len({view.untyped_storage().data_ptr() for view in inputs.views.values()}) == 1
    inputs.write({"a": [1, 2, 3], "b": np.arange(10), "c": range(7)})
    inputs.write({"a": [4, 5, 6], "b": np.arange(10, 20), "c": [9, 8]})
    assert inputs.views["a"].tolist() == [[4, 5, 6]]
    assert inputs.views["b"].tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert inputs.views["c"].tolist() == [9, 8, 2, 3, 4, 5, 6]
    for wrong in ({"a": [1], "b": range(10), "c": []}, {"a": [1, 2, 3], "b": range(10), "c": range(8)}):
        with pytest.raises(AssertionError):
            inputs.write(wrong)


def test_decode_context_is_that_of_the_spans(launchers: Launchers) -> None:
    backend = launchers[1].TritonAttention(20, 4)
    spans = [Span(0, 1, 9, [3, 5, 2]), Span(1, 2, 0, [7]), Span(2, 3, 7, [1, 9])]
    expected = backend.context(spans, CPU)
    tables = backend.decode_tables(spans)
    dtypes = {"tiles": torch.int32, "pages": torch.int32, "slots": torch.int64}
    got = backend.decode_context(**{name: torch.tensor(tables[name], dtype=dtypes[name]) for name in dtypes})
    assert torch.equal(got.tiles[0].table, expected.tiles[0].table)
    assert (got.tiles[0].paged, got.tiles[0].tokens) == (expected.tiles[0].paged, expected.tiles[0].tokens)
    assert torch.equal(got.pages, expected.pages)
    assert torch.equal(got.cached_slots, expected.cached_slots)
    assert got.cached_rows is expected.cached_rows is None


class Stream:
    """Stands for a CUDA stream and writes down what is asked of it."""

    device = CPU

    def __init__(self, log: list[str], name: str) -> None:
        self.log = log
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_cuda_captures_after_warming_up_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    current, side = Stream(log, "current"), Stream(log, "side")

    @contextmanager
    def on(what: str) -> Iterator[None]:
        log.append(f"{what} {{")
        yield
        log.append("}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    def capturing(graph: Graph, pool: str, stream: Stream, capture_error_mode: str) -> Any:
        assert (pool, stream, capture_error_mode) == ("pool", side, "thread_local")
        return on("capture")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on(stream.name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)

    def step() -> str:
        log.append("step")
        return "result"

    replay, result = CudaCapture(CPU)(step)
    replay()
    assert result == "result"
    warming = ["side waits for current", "side {", *["step"] * WARM_UPS, "}", "current waits for side"]
    assert log == [*warming, "capture {", "step", "}", "replay"]


# the recorder that stands for CUDA


def doubled(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x) * 2


def test_a_replay_does_what_was_recorded() -> None:
    x, numbers = torch.arange(3.0), [1]
    replay, result = RecordedGraphs(())(lambda: doubled(x)[numbers[0] :] + numbers[0])
    assert result.tolist() == [3.0, 5.0]
    numbers[0] = 2  # what the host knows is baked in
    x += 10
    replay()
    assert result.tolist() == [23.0, 25.0]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x + torch.from_numpy(np.ones(3, np.float32)),
        lambda x: x.tolist(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x if 1 in x else -x,
    ],
)
def test_what_a_gpu_could_not_capture_is_refused(step: Callable[[Tensor], Any]) -> None:
    x = torch.arange(3.0)
    capture = RecordedGraphs(())
    with pytest.raises(CannotRecord):
        capture(lambda: step(x))


def test_memory_that_is_gone_or_not_written_is_seen() -> None:
    kept = [torch.arange(3.0)]
    replay, result = RecordedGraphs(())(lambda: kept[0] + torch.empty(3))
    replay()
    assert bool(result.isnan().all())
    kept.clear()
    with pytest.raises(AssertionError, match="is gone"):
        replay()
