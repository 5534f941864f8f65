"""16-bit bases, slots filled by copies, and where things run. What needs a GPU is skipped without one.

    pytest tests/test_device.py

on a machine with a GPU exercises the whole device path: Triton's kernels, copies on a stream of their own, both against
peft on the same device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.adapter import Limits, LoraPair
from adapters.arena import build_arena
from adapters.batch import LoraBatch
from adapters.checkpoint import read_checkpoint
from adapters.errors import InvalidAdapter
from adapters.kernels import LoraTerm, LoraWeights, add_lora_reference
from adapters.layers import Computing
from adapters.slots import LoraSlots, StreamUploads
from server.config import InvalidConfig, ServerConfig
from server.engine import engine as engine_module
from server.engine.base_model import load_base
from server.engine.device import DeviceNotAvailable, choose_device, choose_dtype, choose_lora_dtype, to_device
from server.engine.engine import Engine
from server.engine.model_runner import to_host
from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, TOKEN_CLS, SamplingParams
from server.engine.torch_attention import TorchAttention
from server.service import Service
from tests.kernel_grid import POPULARITY, slots_of
from tests.support import Runner, Spec, make_adapter, peft_model, random_ids, relative

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPECS = {
    "tiny-llama": [
        Spec("chat-8", CAUSAL_LM, 8, LINEARS),
        Spec("chat-64", CAUSAL_LM, 64, ["q_proj", "v_proj"], options={"use_rslora": True}),
        Spec("sort", SEQ_CLS, 16, "all-linear", labels=7),
        Spec("tag", TOKEN_CLS, 32, LINEARS, labels=5),
        Spec("embed", FEATURE_EXTRACTION, 8, LINEARS),
    ],
    "tiny-bert": [
        Spec("sort-bias", SEQ_CLS, 8, ["query", "output.dense"], labels=3, options={"bias": "lora_only"}),
        Spec("tag", TOKEN_CLS, 64, ["query", "key", "value", "intermediate.dense"], labels=6),
        Spec("embed", FEATURE_EXTRACTION, 32, ["query", "dense"]),
    ],
}
VECTORS = {
    "tiny-llama": [
        Spec("dora", CAUSAL_LM, 8, LINEARS, options={"use_dora": True}),
        Spec("words-and-logits", CAUSAL_LM, 8, ["embed_tokens", "lm_head"]),
        Spec("own-head", CAUSAL_LM, 8, ["q_proj"], options={"modules_to_save": ["lm_head"]}),
        Spec("tokens", CAUSAL_LM, 8, ["q_proj"], options={"trainable_token_indices": [*range(40, 140)]}),
    ],
    "tiny-bert": [
        Spec("dora", SEQ_CLS, 8, ["query", "dense"], labels=3, options={"use_dora": True}),
        Spec("dora-bias", TOKEN_CLS, 8, ["query", "dense"], labels=3, options={"use_dora": True, "bias": "lora_only"}),
        Spec("bias-all", TOKEN_CLS, 8, ["query"], labels=3, options={"bias": "all"}),
        Spec("words", TOKEN_CLS, 8, ["query", "word_embeddings"], labels=3),
        Spec("bias-of-b", TOKEN_CLS, 8, ["query"], labels=3, options={"bias": "lora_only", "lora_bias": True}),
    ],
}
"""Adapters with vectors that are made of the base's and their own when a slot is written, or with tokens' layers."""
WHERE = [
    pytest.param(CPU, "bfloat16", id="cpu-bf16"),
    pytest.param(CPU, "float16", id="cpu-fp16"),
    *[pytest.param(CUDA, name, id=f"cuda-{name}", marks=needs_gpu) for name in ("float32", "bfloat16", "float16")],
]


class DeviceRunner(Runner):
    """An engine driven by hand, on a device and in a dtype."""

    def __init__(self, location: str, device: torch.device, dtype: str, **settings: Any) -> None:
        self.config = ServerConfig(**{"max_loras": 8, "kv_cache_bytes": 64 << 20, **settings})
        self.base = load_base(location, device, dtype)
        self.engine = Engine(self.config, self.base, "base")
        self.outputs = {}
        self._next = 0

    def load(self, checkpoint: Path, name: str | None = None) -> None:
        adapter = read_checkpoint(checkpoint, self.base.layout, self.engine.limits)
        self.engine.registry.put(name or checkpoint.name, adapter)


# choices


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device("auto") == CPU
    with pytest.raises(DeviceNotAvailable, match="needs an NVIDIA GPU"):
        choose_device("cuda")


@needs_gpu
def test_with_a_gpu_auto_is_it() -> None:
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "device", "saved", "dtype"),
    [
        ("auto", CPU, BF16, FP32),
        ("auto", CUDA, BF16, BF16),
        ("auto", CUDA, FP16, FP16),
        ("auto", CUDA, FP32, BF16),
        ("auto", CUDA, None, BF16),
        ("float16", CPU, FP32, FP16),
        ("float32", CUDA, BF16, FP32),
    ],
)
def test_dtype_of_the_base(name: str, device: torch.device, saved: torch.dtype | None, dtype: torch.dtype) -> None:
    assert choose_dtype(name, device, saved) == dtype


def test_adapters_have_the_bases_dtype_on_a_gpu() -> None:
    assert choose_lora_dtype("auto", CPU, BF16) == "auto"
    assert choose_lora_dtype("auto", CUDA, BF16) == "bfloat16"
    assert choose_lora_dtype("auto", CUDA, FP32) == "float32"
    assert choose_lora_dtype("float16", CUDA, BF16) == "float16"


@pytest.mark.parametrize("settings", [{"device": "tpu"}, {"dtype": "int8"}])
def test_unknown_names_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="is unknown: choose from auto"):
        ServerConfig(**settings)


def test_a_service_loads_the_base_as_configured(base_location: dict[str, str]) -> None:
    service = Service(ServerConfig(base=base_location["tiny-llama"], device="cpu", dtype="bfloat16"))
    loaded = service._load_configured()
    assert (loaded.base.dtype, loaded.base.device) == (BF16, CPU)


# lists to the device and back


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=needs_gpu)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_lists_share_one_copy(device: torch.device, dtype: torch.dtype) -> None:
    arrays: list[Any] = [[3, 1, 2], [], [[1, 2], [3, 4], [5, 6]], np.arange(5)]
    parts = to_device(device, arrays, dtype)
    assert [part.tolist() for part in parts] == [[3, 1, 2], [], [[1, 2], [3, 4], [5, 6]], [0, 1, 2, 3, 4]]
    assert {(part.dtype, part.device.type) for part in parts} == {(dtype, device.type)}
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert all(part.data_ptr() % 16 == 0 for part in parts if len(part))


def test_results_come_back_in_their_shapes() -> None:
    tensors = [torch.rand(3), torch.rand(2, 5).bfloat16(), torch.rand(1, 1)]
    arrays = to_host(tensors)
    assert all(np.array_equal(array, tensor.float()) for array, tensor in zip(arrays, tensors, strict=True))


# 16 bits


@torch.no_grad()
def peft_row(model: Any, task: str, ids: list[int], pooling: str) -> Any:
    """What peft gives for one row: log-probabilities of the next token, logits, or the normalised vector; fp32."""
    inputs = torch.tensor([ids], device=model.device)
    output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    if task == FEATURE_EXTRACTION:
        hidden = output.last_hidden_state[0].float()
        vector = {"mean": hidden.mean(0), "last": hidden[-1]}[pooling]
        return torch.nn.functional.normalize(vector, dim=0).cpu()
    logits = output.logits[0].float().cpu()
    return logits[-1].log_softmax(-1) if task == CAUSAL_LM else logits


def our_row(runner: Runner, sequence: Any) -> Any:
    output = runner.outputs[sequence.id][-1]
    assert output.error is None
    if output.logprobs is None:
        return output.values
    values = dict(output.logprobs.top)
    return np.array([values[token] for token in range(len(values))])


@pytest.mark.parametrize("base", SPECS)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_as_near_to_the_truth_as_peft_in_that_dtype(
    device: torch.device, dtype: str, base: str, base_location: dict[str, str], tmp_path: Path
) -> None:
    """One mixed batch. The truth is peft in fp32 on the CPU; fp32 must give it, 16 bits be at most twice as far from it
    as peft in the same 16 bits is (the criterion of FlashAttention's tests), and one last place."""
    location, specs = base_location[base], SPECS[base]
    runner = DeviceRunner(location, device, dtype)
    prompts = [random_ids(n, n) for n in (9, 30)]
    asked = [(spec, ids) for spec in specs for ids in prompts]
    for spec in specs:
        runner.load(make_adapter(location, tmp_path, spec))
    everything = SamplingParams(max_tokens=1, temperature=0.0, logprobs=320)
    sequences = [
        runner.submit(spec.task, ids, spec.name, everything if spec.task == CAUSAL_LM else None) for spec, ids in asked
    ]
    runner.drain()
    assert len(runner.engine.steps) == 1

    truths, errors, peft_errors = {}, [], []
    for (spec, ids), sequence in zip(asked, sequences, strict=True):
        model = peft_model(location, tmp_path / spec.name, spec.task, spec.labels)
        truth = truths[spec.name, len(ids)] = peft_row(model, spec.task, ids, runner.base.pooling)
        rounded = peft_row(model.to(device, runner.base.dtype), spec.task, ids, runner.base.pooling)
        errors.append(relative(our_row(runner, sequence), truth))
        peft_errors.append(relative(rounded, truth))
    for a, b in combinations(truths, 2):
        if truths[a].shape == truths[b].shape and a[1] == b[1]:
            assert relative(truths[a], truths[b]) > 0.1, "the adapters must differ by more than 16 bits lose"
    bound = 1e-4 if runner.base.dtype == FP32 else 2 * max(peft_errors) + torch.finfo(runner.base.dtype).eps
    assert max(errors) <= bound, (errors, peft_errors)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 13}], ids=["whole", "chunks"])
def test_generation_goes_on_where_prefill_ended(
    device: torch.device, dtype: str, settings: dict[str, Any], base_location: dict[str, str], tmp_path: Path
) -> None:
    """Teacher-forced: each token that was generated is the likeliest, or one last place off, for peft in fp32."""
    location, spec = base_location["tiny-llama"], SPECS["tiny-llama"][0]
    runner = DeviceRunner(location, device, dtype, **settings)
    runner.load(make_adapter(location, tmp_path, spec))
    params = SamplingParams(max_tokens=12, min_tokens=12, temperature=0.0)
    rows = [runner.submit(CAUSAL_LM, random_ids(n, n), spec.name, params) for n in (5, 40, 21)]
    runner.drain()
    model = peft_model(location, tmp_path / spec.name, CAUSAL_LM)
    slack = 1e-4 if runner.base.dtype == FP32 else 8 * torch.finfo(runner.base.dtype).eps
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.output_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        logits[:, sorted(row.eos_ids)] = float("-inf")
        chosen = logits.gather(1, torch.tensor(row.output_ids)[:, None])[:, 0]
        scale = logits[logits.isfinite()].abs().max()
        assert bool((logits.amax(1) - chosen <= slack * scale).all())


# slots that are filled by copies


class DeferredUploads:
    """Stands for a device: a copy happens when it is waited for, and until then the buffer is all NaN."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor, Callable[[Tensor], None]]] = []
        self.copies = 0
        self.buffers = 0

    def copy(self, memory: Tensor, buffer: Tensor | None, then: Callable[[Tensor], None]) -> Tensor:
        if buffer is None or len(buffer) < len(memory):
            buffer = torch.empty(len(memory), dtype=torch.uint8)
            self.buffers += 1
        buffer.fill_(0xFF)
        self.pending.append((memory, buffer, then))
        self.copies += 1
        return buffer

    def wait(self) -> None:
        for memory, buffer, then in self.pending:
            buffer[: len(memory)].copy_(memory)
            then(buffer)
        self.pending.clear()


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> list[DeferredUploads]:
    """Engines that are built meanwhile fill their slots through these."""
    made: list[DeferredUploads] = []

    def slots(body: Any, layout: Any, max_loras: int, uploads: object, output: Any) -> LoraSlots:
        made.append(DeferredUploads())
        return LoraSlots(body, layout, max_loras, made[-1], output)

    monkeypatch.setattr(engine_module, "LoraSlots", slots)
    return made


def served(runner: DeviceRunner, specs: list[Spec], rounds: int) -> list[Any]:
    """Every adapter asked several times, a few sequences at a time, so that slots change hands while others run."""
    sequences = []
    for i in range(rounds):
        for spec in specs:
            params = SamplingParams(max_tokens=3 + i, temperature=0.0) if spec.task == CAUSAL_LM else None
            sequences.append(runner.submit(spec.task, random_ids(4 + i, i), spec.name, params))
    runner.drain()
    return [row.output_ids if row.generates else runner.values(row) for row in sequences]


def assert_same_answers(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a == b if isinstance(b, list) else relative(a, b) < 1e-4


@pytest.mark.parametrize("base", SPECS)
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_slots_change_hands_under_load(
    deferred: list[DeferredUploads], kernel: str, base: str, base_location: dict[str, str], tmp_path: Path
) -> None:
    location, specs = base_location[base], SPECS[base] + VECTORS[base]
    checkpoints = [make_adapter(location, tmp_path, spec) for spec in specs]
    crowded = DeviceRunner(location, CPU, "float32", max_loras=2, kernel=kernel)
    uploads = deferred[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "LoraSlots", LoraSlots)
        roomy = DeviceRunner(location, CPU, "float32", kernel=kernel)
    for runner in (crowded, roomy):
        for checkpoint in checkpoints:
            runner.load(checkpoint)
    for _ in range(2):
        assert_same_answers(served(crowded, specs, 4), served(roomy, specs, 4))
    assert uploads.copies > len(specs), "slots must have changed hands"
    assert uploads.buffers < uploads.copies, "buffers must have been used again"
    assert not uploads.pending


class Stream:
    """Stands for a CUDA stream and writes down what is asked of it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log = log
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"off {self.name}")


def test_streams_wait_for_each_other_around_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    compute, side = Stream(log, "compute"), Stream(log, "side")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append(f"buffer is kept for {stream.name}"))
    uploads = StreamUploads(CPU)
    uploads.wait()
    assert log == [], "without a copy nobody waits"
    memory = torch.arange(100, dtype=torch.uint8)
    copying = ["side waits for compute", "on side", "then", "off side"]

    buffer = uploads.copy(memory, None, lambda b: log.append("then" if torch.equal(b[:100], memory) else "too early"))
    assert log == ["buffer is kept for side", *copying]
    log.clear()
    smaller = memory[50:].clone()
    again = uploads.copy(smaller, buffer, lambda b: log.append("then" if torch.equal(b[:50], smaller) else "too early"))
    assert again is buffer
    assert log == copying
    log.clear()
    uploads.wait()
    uploads.wait()
    assert log == ["compute waits for side"]
    larger = torch.zeros(200, dtype=torch.uint8)
    assert uploads.copy(larger, buffer, lambda b: None) is not buffer


def test_memory_that_is_not_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    with pytest.raises(AssertionError, match="not pinned"):
        StreamUploads(CPU).copy(torch.zeros(4, dtype=torch.uint8), None, lambda b: None)


def test_what_an_engine_takes_on_a_gpu() -> None:
    pytest.importorskip("triton")
    config = ServerConfig(max_lora_rank=8)
    limits = engine_module.adapter_limits(config, CUDA, FP16)
    assert (limits.max_lora_rank, limits.lora_dtype, limits.pinned) == (8, "float16", True)
    assert type(engine_module._attention(config, Computing(add_lora_reference), CUDA)).__name__ == "TritonAttention"
    config = ServerConfig(kernel="torch", lora_dtype="float32")
    assert engine_module.adapter_limits(config, CUDA, FP16).lora_dtype == "float32"
    assert isinstance(engine_module._attention(config, Computing(add_lora_reference), CUDA), TorchAttention)


def test_an_arena_holds_everything_of_an_adapter(base_location: dict[str, str], tmp_path: Path) -> None:
    base = load_base(base_location["tiny-bert"])
    spec = SPECS["tiny-bert"][0]
    adapter = read_checkpoint(
        make_adapter(base_location["tiny-bert"], tmp_path, spec), base.layout, Limits(lora_dtype="bfloat16")
    )
    memory, head = adapter.memory, adapter.head
    assert memory is not None
    assert head is not None
    assert head.bias is not None
    parts = [head.weight, head.bias]
    for pair in adapter.pairs.values():
        assert pair.a.dtype == pair.b.dtype == BF16
        assert pair.bias is not None
        parts += [pair.a, pair.b, pair.bias]
    assert all(part.dtype == FP32 for part in parts if part.dtype != BF16)
    ranges = sorted((part.data_ptr() - memory.data_ptr(), part.nbytes) for part in parts)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges)), "parts must not overlap"
    assert ranges[0][0] >= 0
    assert sum(ranges[-1]) <= len(memory)


@pytest.mark.parametrize(("dtype", "value"), [(FP16, 1e5), (BF16, 3.4e38)])
def test_numbers_that_the_pools_dtype_cannot_hold_are_refused(dtype: torch.dtype, value: float) -> None:
    pair = LoraPair(torch.full((2, 3), value), torch.ones(4, 2), 1.0)
    with pytest.raises(InvalidAdapter, match=f"beyond {dtype}"):
        build_arena({"layer": pair}, dtype)


# with a GPU only


@needs_gpu
@pytest.mark.parametrize("base", SPECS)
def test_slots_change_hands_under_load_on_the_gpu(base: str, base_location: dict[str, str], tmp_path: Path) -> None:
    """fp32, so that answers are the CPU's."""
    location, specs = base_location[base], SPECS[base] + VECTORS[base]
    checkpoints = [make_adapter(location, tmp_path, spec) for spec in specs]
    crowded = DeviceRunner(location, CUDA, "float32", max_loras=2)
    roomy = DeviceRunner(location, CPU, "float32")
    for runner in (crowded, roomy):
        for checkpoint in checkpoints:
            runner.load(checkpoint)
    assert_same_answers(served(crowded, specs, 12), served(roomy, specs, 12))


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_decode_step_waits_for_the_device_once(
    cuda_graphs: bool, base_location: dict[str, str], tmp_path: Path
) -> None:
    location, specs = base_location["tiny-llama"], SPECS["tiny-llama"][:2]
    runner = DeviceRunner(location, CUDA, "bfloat16", cuda_graphs=cuda_graphs)
    for spec in specs:
        runner.load(make_adapter(location, tmp_path, spec))
    params = SamplingParams(max_tokens=20, min_tokens=20, temperature=0.0)
    drawn = SamplingParams(max_tokens=20, top_p=0.9, temperature=0.8, repetition_penalty=1.2, seed=1)
    for spec in specs:
        runner.submit(CAUSAL_LM, random_ids(9, 1), spec.name, params)
        runner.submit(CAUSAL_LM, random_ids(9, 2), spec.name, drawn)
    for _ in range(4):
        runner.engine.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runner.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


@needs_gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 32, 300])
def test_lora_kernel_on_the_gpu(dtype: torch.dtype, tokens: int) -> None:
    from adapters.kernels.triton_lora import TritonLora
    from tests.test_triton_lora import RANKS, TOLERANCE, random_rows, random_weights

    kernel = TritonLora(CUDA, dtype, 64)
    for popularity in POPULARITY:
        group = [random_weights(576, d_out, dtype) for d_out in (576, 192, 200)]
        batch = LoraBatch.of_slots(slots_of(popularity, tokens, len(RANKS)))
        x = random_rows(tokens, 576, dtype)
        before = [random_rows(tokens, weights.d_out, dtype) for weights in group]
        expected = [y.clone() for y in before]
        add_lora_reference(expected, x, group, batch)
        ys = [y.to(CUDA) for y in before]
        kernel(ys, x.to(CUDA), [_on_gpu(weights) for weights in group], batch)
        for y, reference in zip(ys, expected, strict=True):
            assert relative(y.float().cpu(), reference.float()) <= TOLERANCE[dtype], popularity


def _on_gpu(weights: LoraWeights) -> LoraWeights:
    moved = LoraWeights(weights.d_in, weights.d_out, len(weights.terms))
    for slot, term in enumerate(weights.terms):
        if term is not None:
            bias = None if term.bias is None else term.bias.to(CUDA)
            moved.set(slot, LoraTerm(term.a.to(CUDA), term.b.to(CUDA), term.scaling, bias))
    return moved


@needs_gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (32, 8, 128, 128), (12, 12, 32, 32), (8, 4, 256, 256)], ids=str)
def test_attention_kernel_on_the_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from server.engine.triton_attention import TritonAttention
    from tests.test_triton_attention import RULES, assert_equal, run

    for rule in RULES.values():
        got = run(TritonAttention(80, 16), rule, shape, dtype, 16, CUDA)
        assert_equal(got, run(TorchAttention(80, 16), rule, shape, FP32, 16), dtype)


@needs_gpu
def test_cuda_graphs_under_load(base_location: dict[str, str], tmp_path: Path) -> None:
    """Adapters that graphs hold and such as they do not, more of them than slots, fp32: the answers are the CPU's."""
    location, specs = base_location["tiny-llama"], SPECS["tiny-llama"] + VECTORS["tiny-llama"]
    checkpoints = [make_adapter(location, tmp_path, spec) for spec in specs]
    by_graphs = DeviceRunner(location, CUDA, "float32", max_loras=3, cuda_graphs=True)
    roomy = DeviceRunner(location, CPU, "float32")
    for runner in (by_graphs, roomy):
        for checkpoint in checkpoints:
            runner.load(checkpoint)
    assert_same_answers(served(by_graphs, specs, 12), served(roomy, specs, 12))
    graphs = by_graphs.engine.runner.graphs
    assert graphs is not None
    assert {"graph", "prompt"} <= graphs.steps.keys()


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replayed_step_is_the_eager_one(dtype: str, base_location: dict[str, str], tmp_path: Path) -> None:
    """SmolLM2, from 1 to 32 rows of four adapters and the base."""
    location = base_location["smollm2"]
    specs = [Spec(f"a{rank}", CAUSAL_LM, rank, LINEARS) for rank in (4, 8, 16, 64)]
    checkpoints = [make_adapter(location, tmp_path, spec, 0.2) for spec in specs]
    names = [None, *(spec.name for spec in specs)]
    results = []
    for cuda_graphs in (True, False):
        runner = DeviceRunner(location, CUDA, dtype, kv_cache_bytes=1 << 30, cuda_graphs=cuda_graphs)
        for checkpoint in checkpoints:
            runner.load(checkpoint)
        rows = []
        for i in range(32):
            params = SamplingParams(max_tokens=2 + i, min_tokens=2 + i, temperature=0.0, logprobs=1)
            rows.append(runner.submit(CAUSAL_LM, random_ids(5 + i, i, 30000), names[i % len(names)], params))
        runner.drain()
        results.append([[output.logprobs for output in runner.outputs[row.id]] for row in rows])
        if cuda_graphs:
            assert runner.engine.runner.graphs is not None
            assert runner.engine.runner.graphs.steps["graph"] >= 31
    slack = 1e-3 if dtype == "float32" else 0.1
    for by_graph, eager in zip(*results, strict=True):
        for a, b in zip(by_graph, eager, strict=True):
            assert a is not None
            assert b is not None
            assert a.logprob == pytest.approx(b.logprob, abs=slack)
            if a.token_id != b.token_id:
                assert dtype != "float32"
                break  # from here on they continue different texts


@needs_gpu
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_a_real_base_on_the_gpu(kernel: str, base_location: dict[str, str], tmp_path: Path) -> None:
    """SmolLM2 in fp32: peft's tokens on the same device, 32 rows of four adapters."""
    location = base_location["smollm2"]
    specs = [Spec(f"a{rank}", CAUSAL_LM, rank, LINEARS) for rank in (4, 8, 16, 64)]
    runner = DeviceRunner(location, CUDA, "float32", kernel=kernel, kv_cache_bytes=1 << 30)
    for spec in specs:
        runner.load(make_adapter(location, tmp_path, spec, 0.2))
    params = SamplingParams(max_tokens=16, min_tokens=16, temperature=0.0)
    rows = [
        runner.submit(CAUSAL_LM, random_ids(5 + i, i, 30000), specs[i % len(specs)].name, params) for i in range(32)
    ]
    runner.drain()
    for i, spec in enumerate(specs):
        model = peft_model(location, tmp_path / spec.name, CAUSAL_LM).to(CUDA)
        ids = torch.tensor([rows[i].prompt_ids], device=CUDA)
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert rows[i].output_ids == expected[0, ids.shape[1] :].tolist(), spec.name
