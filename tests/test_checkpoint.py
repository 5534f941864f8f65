"""read_checkpoint: a good checkpoint loads whole; a broken one is refused, and the refusal names each fault."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.adapter import Adapter, Limits
from adapters.checkpoint import CONFIG_FILE, LABELS_FILE, WEIGHTS_FILE, read_checkpoint
from adapters.errors import InvalidAdapter
from adapters.layout import BaseLayout, layout_of
from server.engine.base_model import load_base
from tests.support import Spec, make_adapter, rewrite_tensors, save_tiny_base

LIMITS = Limits(max_lora_rank=16, max_adapter_bytes=1 << 20, max_labels=5)
ROOT = "base_model.model."
Q0 = f"{ROOT}model.layers.0.self_attn.q_proj"
BERT_Q0 = f"{ROOT}bert.encoder.layer.0.attention.self.query"
SPECS = {
    "sort": Spec("sort", "SEQ_CLS", 8, ["q_proj", "v_proj"], labels=3),
    "chat": Spec("chat", "CAUSAL_LM", 4, ["q_proj", "up_proj"]),
    "biased": Spec("biased", "TOKEN_CLS", 4, ["query", "output.dense"], labels=2, options={"bias": "lora_only"}),
}
Break = Callable[[Path], object]


class Workshop:
    """Good checkpoints, built once, and copies of them to break."""

    def __init__(self, folder: Path) -> None:
        self.layouts: dict[str, BaseLayout] = {}
        for kind in ("tiny-llama", "tiny-bert"):
            self.layouts[kind] = load_base(str(save_tiny_base(kind, folder / kind))).layout
        self.good = {
            name: make_adapter(folder / ("tiny-bert" if name == "biased" else "tiny-llama"), folder, spec)
            for name, spec in SPECS.items()
        }

    def copy(self, name: str, to: Path) -> Path:
        return Path(shutil.copytree(self.good[name], to / name))

    def read(self, checkpoint: Path, base: str | None = None, limits: Limits = LIMITS) -> Adapter:
        base = base or ("tiny-bert" if checkpoint.name == "biased" else "tiny-llama")
        return read_checkpoint(checkpoint, self.layouts[base], limits)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("checkpoints"))


def config(**changes: Any) -> Break:
    """Change fields of adapter_config.json."""

    def change(checkpoint: Path) -> None:
        file = checkpoint / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    return lambda checkpoint: rewrite_tensors(checkpoint, change)


def file(name: str, content: str | bytes) -> Break:
    """Write a file of the checkpoint anew."""
    data = content.encode() if isinstance(content, str) else content
    return lambda checkpoint: (checkpoint / name).write_bytes(data)


def labels(content: Any) -> Break:
    return file(LABELS_FILE, json.dumps(content))


def without(name: str) -> Break:
    return lambda checkpoint: (checkpoint / name).unlink()


def each(*steps: Break) -> Break:
    def change(checkpoint: Path) -> None:
        for step in steps:
            step(checkpoint)

    return change


def only_a_pickle(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS_FILE).unlink()
    (checkpoint / "adapter_model.bin").write_bytes(pickle.dumps({}))


def cut(to: Callable[[bytes], bytes]) -> Break:
    return lambda checkpoint: file(WEIGHTS_FILE, to((checkpoint / WEIGHTS_FILE).read_bytes()))(checkpoint)


def weights_header(header: dict[str, Any]) -> Break:
    """A weights file with this header and no data."""
    described = json.dumps(header).encode()
    return file(WEIGHTS_FILE, len(described).to_bytes(8, "little") + described)


def put(key: str, *shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> Break:
    return tensors(lambda t: t.update({key: torch.full(shape, value, dtype=dtype)}))


def twice(key: str, other: str) -> Break:
    """A second tensor for the place of `key`."""
    return tensors(lambda t: t.update({other: t[key] + 1}))


def a_directory_in_place_of(name: str) -> Break:
    return each(without(name), lambda checkpoint: (checkpoint / name).mkdir())


BROKEN: dict[str, tuple[str, Break, str]] = {
    # files
    "no-config": ("chat", without(CONFIG_FILE), r"^adapter_config\.json is missing$"),
    "no-weights": ("chat", without(WEIGHTS_FILE), r"^adapter_model\.safetensors is missing$"),
    "pickle": ("chat", only_a_pickle, r"is missing; adapter_model\.bin is a pickle, which is never"),
    "in-several-files": (
        "chat",
        lambda c: (c / WEIGHTS_FILE).rename(c / "adapter_model.safetensors.index.json"),
        r"^adapter_model\.safetensors is missing; it lies in several files \(.*index\.json\), which PEFT neither",
    ),
    "no-directory": ("chat", shutil.rmtree, r"config\.json is missing; adapter_model\.safetensors is missing$"),
    "config-directory": ("chat", a_directory_in_place_of(CONFIG_FILE), r"config\.json cannot be read"),
    "truncated": ("chat", cut(lambda b: b[: len(b) // 2]), r"^adapter_model\.safetensors is broken"),
    "data-behind-the-end": ("chat", cut(lambda b: b + b"\0"), r"^adapter_model\.safetensors is broken"),
    "weights-empty": ("chat", file(WEIGHTS_FILE, b""), r"^adapter_model\.safetensors is broken"),
    "garbage": ("chat", file(WEIGHTS_FILE, b"\xff" * 999), r"adapter_model\.safetensors is broken"),
    "size-beyond-int64": (
        "chat",
        weights_header({"x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
        r"^adapter_model\.safetensors is broken",
    ),
    "strides-beyond-int64": (
        "chat",
        weights_header({"x": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
        r"^adapter_model\.safetensors is broken",
    ),
    "dtype-that-torch-lacks": (
        "chat",
        weights_header({"x": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}),
        r"^adapter_model\.safetensors is broken",
    ),
    "no-tensors": ("chat", weights_header({}), r"it holds no LoRA weights"),
    "config-not-json": ("chat", file(CONFIG_FILE, "{'r': 8}"), r"^adapter_config\.json is not JSON"),
    "config-not-unicode": ("chat", file(CONFIG_FILE, b"\xff{}"), r"^adapter_config\.json is not JSON"),
    "config-too-deep": ("chat", file(CONFIG_FILE, "[" * 99999), r"^adapter_config\.json is not JSON"),
    "config-list": ("chat", file(CONFIG_FILE, "[]"), r"^adapter_config\.json is not a JSON object"),
    "config-long": ("chat", file(CONFIG_FILE, " " * (1 << 20) + "{}"), r"config\.json is larger than"),
    # config
    "rank-zero": ("chat", config(r=0), r"^r must be a positive whole number"),
    "dora-without-magnitudes": ("chat", config(use_dora=True), r"q_proj' lacks lora_magnitude_vector"),
    "dora-with-bias-of-B": ("chat", config(use_dora=True, lora_bias=True), r"^use_dora does not go with lora_bias"),
    "other-method": ("chat", config(peft_type="LOHA"), r"^peft_type 'LOHA' is not supported"),
    "rank-over-limit": ("chat", config(r=17), r"rank 17 of .*q_proj' is over the limit 16"),
    "rank-beyond-float": ("chat", config(r=10**400, lora_alpha=16.0), r"^r must be a positive whole number, not 1000"),
    "pattern-over-limit": ("chat", config(rank_pattern={"up_proj": 32}), r"rank 32 of .*up_proj' is over"),
    "scaling-beyond-fp32": ("chat", config(lora_alpha=1e300), r"scaling|lora_alpha"),
    "pattern-unlike-weights": (
        "chat",
        config(rank_pattern={"q_proj": 5}),
        r"lora_A of .*q_proj' has shape \(4, 64\).*\(5, 64\)",
    ),
    "endless-expression": ("chat", config(target_modules="(.|.)*[!@]"), r"takes too long to match"),
    "endless-pattern": ("chat", config(rank_pattern={"(.|.)*[!@]": 4}), r"takes too long to match"),
    # tensors
    "shape-of-A": (
        "chat",
        put(f"{Q0}.lora_A.weight", 4, 65),
        r"lora_A of .*q_proj' has shape \(4, 65\), this base needs \(4, 64\)",
    ),
    "shape-of-B": (
        "chat",
        put(f"{Q0}.lora_B.weight", 64),
        r"lora_B of .*q_proj' has shape \(64,\), this base needs \(64, 4\)",
    ),
    "scalar-B": ("chat", put(f"{Q0}.lora_B.weight"), r"lora_B of .*q_proj' has shape \(\)"),
    "no-rows-in-A": ("chat", put(f"{Q0}.lora_A.weight", 0, 64), r"lora_A of .*q_proj' has shape \(0, 64\)"),
    "no-B": ("chat", tensors(lambda t: t.pop(f"{Q0}.lora_B.weight")), r"layers\.0\.self_attn\.q_proj' lacks lora_B"),
    "no-A": ("chat", tensors(lambda t: t.pop(f"{Q0}.lora_A.weight")), r"layers\.0\.self_attn\.q_proj' lacks lora_A"),
    "layer-missing": (
        "chat",
        tensors(lambda t: (t.pop(f"{Q0}.lora_A.weight"), t.pop(f"{Q0}.lora_B.weight"))),
        r"'layers\.0\.self_attn\.q_proj' is a target but its weights are missing",
    ),
    "target-missing": (
        "chat",
        tensors(lambda t: [t.pop(key) for key in [*t] if "up_proj" in key]),
        r"target_modules names 'up_proj', for which there are no weights",
    ),
    "layer-beyond-the-base": (
        "chat",
        put(f"{ROOT}model.layers.9.self_attn.q_proj.lora_A.weight", 4, 64),
        r"the base has no linear layer 'model\.layers\.9\.self_attn\.q_proj'",
    ),
    "bias-of-a-norm": (
        "chat",
        put(f"{ROOT}model.layers.0.input_layernorm.bias", 64),
        r"the base has no linear layer 'model\.layers\.0\.input_layernorm'",
    ),
    "bias-of-B": ("chat", put(f"{Q0}.lora_B.bias", 64), r"q_proj' has lora_B\.bias but the config does not say lora_b"),
    "bias-of-A": ("chat", put(f"{Q0}.lora_A.bias", 4), r"no linear layer .*q_proj\.lora_A'"),
    "no-bias-of-B": ("chat", config(lora_bias=True), r"q_proj' lacks lora_B\.bias"),
    "shape-of-bias-of-B": (
        "chat",
        each(config(lora_bias=True), put(f"{Q0}.lora_B.bias", 4)),
        r"lora_B\.bias of .*q_proj' has shape \(4,\), this base needs \(64,\)",
    ),
    "not-a-target": (
        "chat",
        each(
            put(f"{Q0.replace('q_proj', 'k_proj')}.lora_A.weight", 4, 64),
            put(f"{Q0.replace('q_proj', 'k_proj')}.lora_B.weight", 32, 4),
        ),
        r"'model\.layers\.0\.self_attn\.k_proj' is not among target_modules",
    ),
    "extra-tensor": ("chat", put("lora_magic", 3), r"tensor 'lora_magic' has no place in this base"),
    "magnitude": (
        "chat",
        put(f"{Q0}.lora_magnitude_vector", 64),
        r"q_proj' has lora_magnitude_vector but the config does not say use_dora",
    ),
    "magnitude-shape": (
        "chat",
        each(config(use_dora=True), put(f"{Q0}.lora_magnitude_vector", 64, 1)),
        r"lora_magnitude_vector of .*q_proj' has shape \(64, 1\), this base needs \(64,\)",
    ),
    "magnitude-twice": (
        "chat",
        each(
            config(use_dora=True),
            put(f"{Q0}.lora_magnitude_vector", 64),
            put(f"{Q0}.lora_magnitude_vector.default.weight", 64),
        ),
        r"q_proj' has lora_magnitude_vector twice",
    ),
    "embedding": ("chat", put(f"{ROOT}model.embed_tokens.weight", 320, 63), r"'embed_tokens' has shape \(320, 63\)"),
    "A-under-two-names": ("chat", twice(f"{Q0}.lora_A.weight", f"{Q0}.lora_A.default.weight"), r"q_proj'.* twice"),
    "A-with-and-without-root": (
        "chat",
        twice(f"{Q0}.lora_A.weight", f"{Q0.removeprefix(ROOT)}.lora_A.weight"),
        r"q_proj'.* twice",
    ),
    "module-with-and-without-prefix": (
        "chat",
        each(
            *(
                twice(f"{Q0}.{part}.weight", f"{Q0.replace('model.model.', 'model.')}.{part}.weight")
                for part in ("lora_A", "lora_B")
            )
        ),
        r"layers\.0\.self_attn\.q_proj' occurs twice",
    ),
    "nan": ("chat", put(f"{Q0}.lora_A.weight", 4, 64, value=float("nan")), r"q_proj\.lora_A\.weight' has NaN"),
    "infinity": (
        "chat",
        put(f"{Q0}.lora_B.weight", 64, 4, value=float("-inf")),
        r"q_proj\.lora_B\.weight' has NaN or inf",
    ),
    "fp16-infinity": (
        "chat",
        put(f"{Q0}.lora_B.weight", 64, 4, value=float("inf"), dtype=torch.float16),
        r"q_proj\.lora_B\.weight' has NaN or inf",
    ),
    "bf16-nan": (
        "chat",
        put(f"{Q0}.lora_B.weight", 64, 4, value=float("nan"), dtype=torch.bfloat16),
        r"q_proj\.lora_B\.weight' has NaN or inf",
    ),
    "int32": ("chat", put(f"{Q0}.lora_A.weight", 4, 64, dtype=torch.int32), r"lora_A\.weight' has dtype torch\.int32"),
    "fp64": ("chat", put(f"{Q0}.lora_A.weight", 4, 64, dtype=torch.float64), r"has dtype torch\.float64"),
    "bias-unannounced": (
        "chat",
        put(f"{Q0}.base_layer.bias", 64),
        r"q_proj' has a bias but the config says bias: 'none'",
    ),
    "bias-without-base": (
        "chat",
        each(config(bias="lora_only"), put(f"{Q0}.base_layer.bias", 64)),
        r"the base's .*q_proj' has no bias to replace",
    ),
    "bias-shape": ("biased", put(f"{BERT_Q0}.base_layer.bias", 63), r"bias of .*query' has shape \(63,\)"),
    "bias-none": ("biased", config(bias="none"), r"query' has a bias but the config says bias: 'none'"),
    "bias-of-no-target": (
        "biased",
        put(f"{BERT_Q0.replace('query', 'key')}.bias", 64),
        r"key' is not among target_modules",
    ),
    "bias-all-shape": (
        "biased",
        each(config(bias="all"), put(f"{BERT_Q0.replace('query', 'key')}.bias", 63)),
        r"bias of .*key' has shape \(63,\), this base needs \(64,\)",
    ),
    "bias-all-without-base": (
        "chat",
        each(config(bias="all"), put(f"{ROOT}model.layers.0.mlp.gate_proj.bias", 96)),
        r"the base's .*gate_proj' has no bias to replace",
    ),
    "bias-all-of-a-norm-shape": (
        "biased",
        each(config(bias="all"), put(f"{ROOT}bert.embeddings.LayerNorm.bias", 65)),
        r"bias of .*embeddings\.LayerNorm' has shape \(65,\), this base needs \(64,\)",
    ),
    "bias-all-of-nothing": (
        "chat",
        each(config(bias="all"), put(f"{ROOT}model.nothing.bias", 320)),
        r"the bias of 'model.nothing' is that of no linear layer and no norm",
    ),
    "bias-all-twice": (
        "biased",
        each(
            config(bias="all"),
            put(f"{ROOT}bert.embeddings.LayerNorm.bias", 64),
            put(f"{ROOT}embeddings.LayerNorm.bias", 64),
        ),
        r"embeddings\.LayerNorm' occurs twice",
    ),
    "bias-twice": ("biased", twice(f"{BERT_Q0}.base_layer.bias", f"{BERT_Q0}.bias"), r"query'.* twice"),
    # head
    "no-head": ("sort", tensors(lambda t: t.pop(f"{ROOT}score.weight")), r"a SEQ_CLS adapter needs one head"),
    "head-unannounced": ("sort", config(modules_to_save=None), r"score\.weight' has no place"),
    "head-width": ("sort", put(f"{ROOT}score.weight", 3, 65), r"head 'score' has shape \(3, 65\).*\(labels, 64\)"),
    "head-flat": ("sort", put(f"{ROOT}score.weight", 64), r"head 'score' has shape \(64,\)"),
    "head-empty": ("sort", put(f"{ROOT}score.weight", 0, 64), r"head 'score' has shape \(0, 64\)"),
    "head-over-max-labels": ("sort", put(f"{ROOT}score.weight", 6, 64), r"head 'score' has shape \(6, 64\)"),
    "head-bias": ("sort", put(f"{ROOT}score.bias", 4), r"the bias of head 'score' has shape \(4,\), not \(3,\)"),
    "head-part": ("sort", put(f"{ROOT}score.scale", 3), r"score\.scale' has no place"),
    "head-under-two-names": (
        "sort",
        twice(f"{ROOT}score.weight", f"{ROOT}score.modules_to_save.default.weight"),
        r"score.* twice",
    ),
    "two-heads": (
        "sort",
        each(config(modules_to_save=["score", "classifier"]), put(f"{ROOT}classifier.weight", 3, 64)),
        r"a SEQ_CLS adapter needs one head",
    ),
    "idle-head": ("sort", config(task_type="CAUSAL_LM"), r"a CAUSAL_LM adapter has no use for a head"),
    "lm-head": (
        "chat",
        config(modules_to_save=["lm_head"]),
        r"modules_to_save names 'lm_head', for which there",
    ),
    "saved-norm": (
        "chat",
        each(config(modules_to_save=["norm"]), put(f"{ROOT}model.norm.weight", 64)),
        r"modules_to_save 'norm' is not supported",
    ),
    "task-without-its-head": (
        "chat",
        config(task_type="SEQ_CLS"),
        r"a SEQ_CLS adapter needs one head \(score or classifier\)",
    ),
    # labels
    "labels-too-few": ("sort", labels(["a", "b"]), r"there are 2 labels but the head has 3 outputs"),
    "labels-twice": ("sort", labels(["a", "b", "a"]), r"labels\.json: a label occurs twice"),
    "labels-over-limit": ("sort", labels([*"abcdef"]), r"labels\.json has 6 labels, over the limit 5"),
    "labels-numbers": ("sort", labels([1, 2, 3]), r"labels\.json: the labels must be a list of strings"),
    "labels-string": ("sort", labels({"labels": "abc"}), r"labels\.json: the labels must be a list"),
    "labels-no-object": ("sort", labels("abc"), r"labels\.json is neither a list nor an object"),
    "labels-gap": ("sort", labels({"id2label": {"0": "a", "2": "b"}}), r"not numbered from 0 without gaps"),
    "labels-unnumbered": ("sort", labels({"id2label": {"x": "a"}}), r"not numbered from 0 without gaps"),
    "labels-superscript": ("sort", labels({"id2label": {"²": "a"}}), r"not numbered from 0 without gaps"),
    "labels-endless-number": ("sort", labels({"id2label": {"1" * 5000: "a"}}), r"not numbered from 0"),
    "labels-under-no-known-key": ("sort", labels({"0": "a", "1": "b", "2": "c"}), r"labels\.json"),
    "problem-type": ("sort", labels({"problem_type": "poetry"}), r"labels\.json: problem_type 'poetry'"),
    "labels-not-json": ("sort", file(LABELS_FILE, "a\nb\nc"), r"^labels\.json is not JSON"),
    "model-config": ("sort", file("config.json", '{"id2label": {"0": "a"}}'), r"there are 1 labels but the head has 3"),
}


@pytest.mark.parametrize(("name", "break_it", "fault"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_by_its_fault(
    workshop: Workshop, tmp_path: Path, name: str, break_it: Break, fault: str
) -> None:
    checkpoint = workshop.copy(name, tmp_path)
    workshop.read(checkpoint)
    break_it(checkpoint)
    with pytest.raises(InvalidAdapter, match=fault):
        workshop.read(checkpoint)


@pytest.mark.parametrize(
    ("name", "base", "fault"),
    [
        pytest.param("chat", "tiny-bert", r"no linear layer 'model\.layers\.0", id="llama-on-bert"),
        pytest.param("biased", "tiny-llama", r"no linear layer 'bert\.encoder", id="bert-on-llama"),
    ],
)
def test_an_adapter_of_another_architecture_is_refused(workshop: Workshop, name: str, base: str, fault: str) -> None:
    with pytest.raises(InvalidAdapter, match=fault):
        workshop.read(workshop.good[name], base=base)


def test_an_adapter_of_a_base_of_another_size_is_refused(workshop: Workshop) -> None:
    wider = torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})
    for _ in range(3):
        block = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(80, 80, bias=False)})})
        block["mlp"] = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(80, 96, bias=False)})
        wider["layers"].append(block)  # type: ignore[operator]
    with pytest.raises(InvalidAdapter) as caught:
        read_checkpoint(workshop.good["chat"], layout_of(wider, "model", 80, generates=True), LIMITS)
    assert all("this base needs" in reason for reason in caught.value.reasons)
    assert len(caught.value.reasons) == 3 * 3, "A and B of each q_proj, A of each up_proj"


@pytest.mark.parametrize("spare", [0, -1])
def test_a_file_may_be_as_large_as_the_limit_and_no_larger(workshop: Workshop, spare: int) -> None:
    size = (workshop.good["chat"] / WEIGHTS_FILE).stat().st_size
    limits = Limits(max_adapter_bytes=size + spare)
    if spare == 0:
        assert workshop.read(workshop.good["chat"], limits=limits).info.num_bytes == size
    else:
        with pytest.raises(InvalidAdapter, match=rf"adapter_model\.safetensors is larger than the limit of {size - 1}"):
            workshop.read(workshop.good["chat"], limits=limits)


def test_several_faults_are_told_at_once(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.copy("sort", tmp_path)
    each(
        tensors(lambda t: t.pop(f"{Q0}.lora_A.weight")),
        put(f"{Q0.replace('.0.', '.1.')}.lora_B.weight", 5, 5),
        put(f"{Q0.replace('.0.', '.2.')}.lora_B.weight", 64, 8, value=float("nan")),
        put("lora_magic", 3),
        labels(["one"]),
    )(checkpoint)
    with pytest.raises(InvalidAdapter) as caught:
        workshop.read(checkpoint)
    for fault in ("lacks lora_A", "has shape (5, 5)", "has NaN", "'lora_magic' has no place", "there are 1 labels"):
        assert sum(fault in reason for reason in caught.value.reasons) == 1, fault
    assert len(caught.value.reasons) == 5


def test_a_flood_of_faults_is_cut_short(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.copy("chat", tmp_path)
    tensors(lambda t: t.update({f"extra.{i}": torch.zeros(1) for i in range(500)}))(checkpoint)
    with pytest.raises(InvalidAdapter) as caught:
        workshop.read(checkpoint)
    assert len(caught.value.reasons) == 21
    assert caught.value.reasons[-1] == "and 480 more reasons"


def content_of(tensor: torch.Tensor) -> bytes:
    """Its numbers in order, wherever and however they lie."""
    return tensor.detach().float().contiguous().numpy().tobytes()


@pytest.mark.parametrize("name", SPECS)
def test_a_good_checkpoint_loads_whole(workshop: Workshop, name: str) -> None:
    spec = SPECS[name]
    saved = load_file(workshop.good[name] / WEIGHTS_FILE)
    adapter = workshop.read(workshop.good[name])
    assert set(adapter.coverage) == set(saved)
    assert (adapter.info.task_type, adapter.info.rank) == (spec.task, spec.rank)
    assert adapter.info.num_bytes == (workshop.good[name] / WEIGHTS_FILE).stat().st_size
    assert (adapter.head is not None) == bool(spec.labels)
    placed = [t for pair in adapter.pairs.values() for t in (pair.a, pair.b, pair.bias) if t is not None]
    placed += [t for t in (adapter.head.weight, adapter.head.bias) if t is not None] if adapter.head else []
    assert len(placed) == len(saved)
    assert sorted(map(content_of, placed)) == sorted(map(content_of, saved.values()))
    assert {pair.scaling for pair in adapter.pairs.values()} == {2.0}
    assert all((pair.bias is not None) == (name == "biased") for pair in adapter.pairs.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_as_saved(workshop: Workshop, tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = workshop.copy("chat", tmp_path)
    tensors(lambda t: t.update({key: value.to(dtype) for key, value in t.items()}))(checkpoint)
    pair = workshop.read(checkpoint).pairs["layers.0.self_attn.q_proj"]
    assert pair.a.dtype == pair.b.dtype == dtype
    assert torch.equal(pair.a, workshop.read(workshop.good["chat"]).pairs["layers.0.self_attn.q_proj"].a.to(dtype))


def without_root(key: str) -> str:
    return key.removeprefix(ROOT)


def with_name_of_the_adapter(key: str) -> str:
    """As a whole state dict has them."""
    key = key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
    return key.replace("score.", "score.modules_to_save.default.").replace(
        "classifier.", "classifier.modules_to_save.default."
    )


def without_base_layer(key: str) -> str:
    """As PEFT wrote biases before 0.6."""
    return key.replace(".base_layer.", ".")


@pytest.mark.parametrize("rename", [without_root, with_name_of_the_adapter, without_base_layer])
@pytest.mark.parametrize("name", SPECS)
def test_other_names_of_tensors_mean_the_same(
    workshop: Workshop, tmp_path: Path, name: str, rename: Callable[[str], str]
) -> None:
    checkpoint = workshop.copy(name, tmp_path)
    tensors(lambda t: [t.update({rename(key): t.pop(key)}) for key in [*t]])(checkpoint)
    got, expected = workshop.read(checkpoint), workshop.read(workshop.good[name])
    assert got.pairs.keys() == expected.pairs.keys()
    for module, pair in expected.pairs.items():
        for part in ("a", "b", "bias"):
            ours, theirs = getattr(got.pairs[module], part), getattr(pair, part)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert (got.head is None) == (expected.head is None)
    if got.head is not None and expected.head is not None:
        assert torch.equal(got.head.weight, expected.head.weight)


@pytest.mark.parametrize("name", SPECS)
def test_the_same_content_elsewhere_has_the_same_digest(workshop: Workshop, tmp_path: Path, name: str) -> None:
    assert workshop.read(workshop.copy(name, tmp_path)).info.digest == workshop.read(workshop.good[name]).info.digest


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(tensors(lambda t: t[f"{Q0}.lora_A.weight"].mul_(-1)), id="weights"),
        pytest.param(tensors(lambda t: t[f"{ROOT}score.weight"].mul_(-1)), id="head"),
        pytest.param(config(lora_alpha=17), id="config"),
        pytest.param(config(revision="v2"), id="config-origin"),
        pytest.param(labels(["a", "b", "c"]), id="labels"),
        pytest.param(labels({"problem_type": "multi_label_classification"}), id="problem-type"),
    ],
)
def test_other_content_has_another_digest(workshop: Workshop, tmp_path: Path, change: Break) -> None:
    checkpoint = workshop.copy("sort", tmp_path)
    before = workshop.read(checkpoint).info.digest
    change(checkpoint)
    assert workshop.read(checkpoint).info.digest != before


def test_what_is_known_is_read_again_as_it_was_unless_its_size_changed(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.copy("sort", tmp_path)
    first = workshop.read(checkpoint)
    layout = workshop.layouts["tiny-llama"]
    again = read_checkpoint(checkpoint, layout, LIMITS, first.info)
    assert again.info == first.info
    assert again.pairs.keys() == first.pairs.keys()
    for name, pair in first.pairs.items():
        assert torch.equal(again.pairs[name].a, pair.a)
        assert torch.equal(again.pairs[name].b, pair.b)
    tensors(lambda t: t[f"{Q0}.lora_A.weight"].mul_(0.5))(checkpoint)
    halved = read_checkpoint(checkpoint, layout, LIMITS, replace(first.info, num_bytes=first.info.num_bytes + 1))
    assert halved.info == workshop.read(checkpoint).info
    assert halved.info.digest != first.info.digest


def test_the_order_of_labels_is_content(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.copy("sort", tmp_path)
    digests = set()
    for order in (["a", "b", "c"], ["c", "b", "a"]):
        labels(order)(checkpoint)
        digests.add(workshop.read(checkpoint).info.digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        pytest.param(each(), ("LABEL_0", "LABEL_1", "LABEL_2"), id="default"),
        pytest.param(labels(["c", "a", "b"]), ("c", "a", "b"), id="list"),
        pytest.param(labels({"labels": ["c", "a", "b"]}), ("c", "a", "b"), id="labels"),
        pytest.param(labels({"id2label": {"2": "b", "0": "c", "1": "a"}}), ("c", "a", "b"), id="id2label"),
        pytest.param(file("config.json", '{"id2label": {"0": "c", "1": "a", "2": "b"}}'), ("c", "a", "b"), id="model"),
        pytest.param(each(labels([*"xyz"]), file("config.json", "{}")), ("x", "y", "z"), id="both"),
        pytest.param(file("config.json", '{"model_type": "llama"}'), ("LABEL_0", "LABEL_1", "LABEL_2"), id="neither"),
    ],
)
def test_labels_are_found(workshop: Workshop, tmp_path: Path, prepare: Break, expected: tuple[str, ...]) -> None:
    checkpoint = workshop.copy("sort", tmp_path)
    prepare(checkpoint)
    assert workshop.read(checkpoint).info.labels == expected


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        pytest.param(each(), "single_label_classification", id="default"),
        pytest.param(put(f"{ROOT}score.weight", 1, 64), "regression", id="one-label"),
        pytest.param(labels({"problem_type": "multi_label_classification"}), "multi_label_classification", id="told"),
        pytest.param(file("config.json", '{"problem_type": "regression"}'), "regression", id="told-by-model-config"),
    ],
)
def test_the_problem_type_is_found(workshop: Workshop, tmp_path: Path, prepare: Break, expected: str) -> None:
    checkpoint = workshop.copy("sort", tmp_path)
    prepare(checkpoint)
    assert workshop.read(checkpoint).info.problem_type == expected


@pytest.mark.parametrize(("base", "task"), [("tiny-llama", "CAUSAL_LM"), ("tiny-bert", "FEATURE_EXTRACTION")])
def test_without_task_type_the_base_decides(workshop: Workshop, tmp_path: Path, base: str, task: str) -> None:
    name = "chat" if base == "tiny-llama" else "biased"
    checkpoint = workshop.copy(name, tmp_path)
    config(task_type=None, modules_to_save=None)(checkpoint)
    tensors(lambda t: [t.pop(key) for key in [*t] if "classifier" in key])(checkpoint)
    assert workshop.read(checkpoint).info.task_type == task


def flipped(content: bytes, flips: list[tuple[int, int]], length: int) -> bytes:
    changed = bytearray(content)
    for position, bit in flips:
        changed[position % len(content)] ^= 1 << bit
    return bytes(changed[: max(0, len(content) - length)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    flips=st.lists(st.tuples(st.integers(0, 1500) | st.integers(0, 1 << 20), st.integers(0, 7)), max_size=4),
    length=st.just(0) | st.integers(0, 1 << 16),
)
def test_damaged_weights_are_refused_or_load(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], length: int
) -> None:
    checkpoint = workshop.copy("chat", tmp_path_factory.mktemp("damaged"))
    cut(lambda content: flipped(content, flips, length))(checkpoint)
    adapter, reasons = read_or_reasons(workshop, checkpoint)
    if adapter is None:
        assert reasons
    else:
        assert len(adapter.pairs) == 6
        assert all(bool(pair.a.isfinite().all()) for pair in adapter.pairs.values())


def read_or_reasons(workshop: Workshop, checkpoint: Path) -> tuple[Adapter | None, tuple[str, ...]]:
    try:
        return workshop.read(checkpoint), ()
    except InvalidAdapter as refusal:
        return None, refusal.reasons
