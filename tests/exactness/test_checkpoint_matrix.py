"""Every kind of PEFT checkpoint on a Llama, a GPT-2, a BERT …: each row of one mixed batch is `peft`'s alone.

All adapters of a base run together, base rows between them; then each is compared with `peft`, one cell a test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import AdaLoraConfig, get_peft_model
from peft.utils.warning import PeftWarning
from transformers import AutoModel, DistilBertConfig, ElectraConfig, GPT2Config, GPT2LMHeadModel

from server.engine.request import CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, TOKEN_CLS, SamplingParams
from tests.support import (
    MODEL_CLASSES,
    Runner,
    Spec,
    make_adapter,
    peft_model,
    peft_values,
    random_ids,
    relative,
    rewrite_tensors,
    save_tiny_base,
    tiny_tokenizer,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{beginning}")
    for beginning in (
        "The following rank_pattern keys",  # AdaLoRA's, which peft takes for LoRA's
        "fan_in_fan_out is set to",  # where targets lie both ways
        "You have requested `ensure_weight_tying`",  # of names of embeddings that peft does not know
    )
]
NEW_TOKENS = 10
VOCABULARY = 320
BASE_PROMPT = random_ids(13, 1)


def prompt_of(spec: Spec) -> list[int]:
    """With tokens that trainable_token_indices names, and the last one that the adapter knows, where it has its own."""
    size = spec.vocabulary or VOCABULARY
    ids = random_ids(17, 2, min(size, VOCABULARY))
    special = spec.vocabulary or "trainable_token_indices" in spec.options
    return [*ids[:-4], 5, 9, 7, size - 1] if special else ids


def greedy(vocabulary: int = VOCABULARY) -> SamplingParams:
    return SamplingParams(max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0.0, logprobs=vocabulary)


RANK_LABELS_VOCABULARY = {"rank": 4, "labels": 0, "vocabulary": 0}


def lora(name: str, targets: list[str] | str = "all-linear", task: str = CAUSAL_LM, **options: Any) -> Spec:
    rank, labels, vocabulary = (options.pop(name, other) for name, other in RANK_LABELS_VOCABULARY.items())
    return Spec(name, task, rank, targets, labels, options, vocabulary)


def gpt2(name: str, targets: list[str] | str = "all-linear", task: str = CAUSAL_LM, **options: Any) -> Spec:
    return lora(name, targets, task, fan_in_fan_out=True, **options)


def bert(name: str, targets: list[str] | str = "all-linear", task: str = TOKEN_CLS, **options: Any) -> Spec:
    return lora(name, targets, task, labels=options.pop("labels", 3), **options)


KINDS: dict[str, list[Spec]] = {
    "tiny-llama": [
        lora("lora"),
        lora("two-targets", ["q_proj", "down_proj"], use_rslora=True),
        lora("layers", ["q_proj", "up_proj"], layers_to_transform=[0, 2]),
        lora("excluded", exclude_modules=r"model\.layers\.1\..*"),
        lora(
            "excluded-targets", ["q_proj", "k_proj", "o_proj"], exclude_modules=["k_proj", "layers.0.self_attn.o_proj"]
        ),
        lora("lora-float16"),
        lora("lora-bfloat16"),
        lora("adalora", ["q_proj", "up_proj"], rank=6),
        lora("lora_bias", ["q_proj", "down_proj"], lora_bias=True),
        lora("classes", ["q_proj"], SEQ_CLS, labels=4),
        lora("regression", ["q_proj"], SEQ_CLS, labels=1),
        lora("dora", use_dora=True),
        lora(
            "dora-some-ranks",
            ["q_proj", "v_proj", "up_proj"],
            use_dora=True,
            use_rslora=True,
            rank_pattern={"q_proj": 9},
        ),
        lora("embedding", ["q_proj", "embed_tokens"], rank=6),
        lora("head", ["lm_head"], use_rslora=True),
        lora("embedding-and-head", r".*\.(embed_tokens|v_proj)|lm_head", rank_pattern={"lm_head": 7}),
        lora("head-dora", ["q_proj", "lm_head"], use_dora=True),
        lora("head-lora_bias", ["o_proj", "lm_head"], lora_bias=True),
        lora("own-embedding", ["q_proj"], modules_to_save=["embed_tokens"]),
        lora("own-head", ["q_proj"], modules_to_save=["lm_head"]),
        lora("own-both", ["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        lora("own-head-embedding-lora", ["q_proj", "embed_tokens"], modules_to_save=["lm_head"]),
        lora("tokens", ["q_proj"], trainable_token_indices=[300, 9, 7, 5]),
        lora("head-tokens", ["q_proj"], trainable_token_indices={"lm_head": [3, 8], "embed_tokens": [7, 300]}),
        lora("embedding-float16", ["embed_tokens"]),
        lora("more-tokens", ["q_proj"], vocabulary=331),
        lora("more-tokens-own", ["q_proj"], modules_to_save=["lm_head", "embed_tokens"], vocabulary=327),
        lora("more-tokens-lora", ["embed_tokens", "lm_head"], vocabulary=340),
        lora("more-tokens-trained", ["v_proj"], trainable_token_indices=[321, 320, 11], vocabulary=323),
        lora("fewer-tokens", ["v_proj"], vocabulary=310),
        lora("embedding-classes", ["q_proj", "embed_tokens"], SEQ_CLS, labels=4),
        lora("own-embedding-tags", ["q_proj"], TOKEN_CLS, labels=3, modules_to_save=["score", "embed_tokens"]),
        lora("embedding-vectors", ["q_proj", "embed_tokens"], FEATURE_EXTRACTION),
    ],
    "tiny-tied-llama": [
        lora("lora"),
        lora("embedding", ["q_proj", "embed_tokens"]),
        lora("head", ["q_proj", "lm_head"]),
        lora("tied", ["q_proj", "embed_tokens"], ensure_weight_tying=True),
        lora("tied-by-head", ["q_proj", "lm_head"], ensure_weight_tying=True),
        lora("own-embedding", ["q_proj"], modules_to_save=["embed_tokens"]),
        lora("own-head", ["q_proj"], modules_to_save=["lm_head"]),
        lora("own-tied", ["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        lora("tokens", ["q_proj"], trainable_token_indices=[5, 9, 300]),
        lora("tokens-of-both", ["q_proj"], trainable_token_indices={"embed_tokens": [7, 8], "lm_head": [7, 8]}),
        lora("other-tokens", ["q_proj"], trainable_token_indices={"embed_tokens": [7, 8], "lm_head": [5, 9]}),
        lora("head-tokens", ["q_proj"], trainable_token_indices={"lm_head": [5, 9]}),
        lora("more-tokens", ["q_proj"], vocabulary=331),
        lora("more-tokens-lora", ["embed_tokens"], vocabulary=340),
        lora("more-tokens-trained", ["v_proj"], trainable_token_indices=[321, 11], vocabulary=323),
        lora("more-tokens-own", ["v_proj"], modules_to_save=["embed_tokens"], vocabulary=323),
    ],
    "tiny-gpt2": [
        gpt2("lora"),
        gpt2("fused-projection", ["c_attn"], rank=8),
        gpt2("layers", ["c_attn"], layers_to_transform=1, layers_pattern="h"),
        gpt2("bias-lora_only", ["c_attn", "mlp.c_proj"], bias="lora_only"),
        gpt2("bias-all", ["c_attn"], bias="all"),
        gpt2("lora_bias", lora_bias=True),
        gpt2("lora_bias-lora_only", ["c_attn", "c_fc"], lora_bias=True, bias="lora_only"),
        gpt2("adalora", ["c_attn"], rank=5),
        gpt2("dora", use_dora=True),
        gpt2("dora-lora_only", ["c_attn", "c_fc"], use_dora=True, bias="lora_only"),
        gpt2("dora-bias-all", ["mlp.c_proj"], use_dora=True, bias="all"),
        gpt2("regression", ["c_attn"], SEQ_CLS, labels=1),
        gpt2("tags", ["c_attn"], TOKEN_CLS, labels=5),
        gpt2("classes", ["c_attn", "c_fc"], SEQ_CLS, labels=3),
        gpt2("embedding", ["c_attn", "wte"]),
        gpt2("embedding-ensured", ["c_attn", "wte"], ensure_weight_tying=True),
        gpt2("head", ["c_attn", "lm_head"]),
        gpt2("head-dora", ["c_attn", "lm_head"], use_dora=True),
        gpt2("own-embedding", ["c_attn"], modules_to_save=["wte"]),
        gpt2("own-both", ["c_attn"], modules_to_save=["wte", "lm_head"]),
        gpt2("tokens", ["c_attn"], trainable_token_indices=[5, 9, 300]),
        gpt2("other-tokens", ["c_attn"], trainable_token_indices={"wte": [7, 8], "lm_head": [5]}),
        gpt2("more-tokens", ["c_attn"], vocabulary=333),
        gpt2("embedding-bias-all", ["wte"], bias="all"),
        gpt2("embedding-classes", ["c_attn", "wte"], SEQ_CLS, labels=3),
    ],
    "tiny-bert": [
        bert("lora"),
        bert("layers", ["query", "key"], layers_to_transform=[1, 2], layers_pattern=["layer"]),
        bert("excluded", ["query", "dense"], exclude_modules=["output.dense"]),
        bert("bias-lora_only", ["query", "output.dense"], bias="lora_only"),
        bert("bias-all", ["query", "value"], bias="all"),
        bert("bias-all-classes", ["key"], SEQ_CLS, bias="all"),
        bert("bias-all-vectors", ["key", "intermediate.dense"], FEATURE_EXTRACTION, labels=0, bias="all"),
        bert("classes", ["query", "dense"], SEQ_CLS),
        bert("regression", ["query"], SEQ_CLS, labels=1),
        bert("own-pooler", ["query", "dense"], SEQ_CLS, modules_to_save=["classifier", "pooler"]),
        bert("dora", use_dora=True),
        bert("dora-bfloat16", ["key", "dense"], use_dora=True),
        bert("dora-classes", ["query", "dense"], SEQ_CLS, use_dora=True, bias="lora_only"),
        bert("lora_bias", ["query", "dense"], lora_bias=True),
        bert("embedding", ["query", "word_embeddings"]),
        bert("embedding-classes", ["query", "word_embeddings"], SEQ_CLS),
        bert("own-embedding", ["query"], modules_to_save=["word_embeddings", "classifier"]),
        bert("own-embedding-vectors", ["key"], FEATURE_EXTRACTION, labels=0, modules_to_save=["word_embeddings"]),
        bert("tokens", ["query"], trainable_token_indices=[300, 9, 7, 5]),
        bert("tokens-vectors", ["query"], FEATURE_EXTRACTION, labels=0, trainable_token_indices=[300, 9, 7, 5]),
        bert("more-tokens", ["value"], vocabulary=333),
    ],
    "tiny-distilbert": [
        bert("tags", ["q_lin", "lin1"]),
        bert("classes", ["q_lin", "lin2"], SEQ_CLS, modules_to_save=["pre_classifier", "classifier"]),
        bert("dora", ["q_lin"], SEQ_CLS, labels=2, use_dora=True, modules_to_save=["pre_classifier", "classifier"]),
    ],
    "tiny-electra": [
        bert("tags"),
        bert("classes", ["query", "dense"], SEQ_CLS, labels=4),
        bert("bias-all", ["query"], SEQ_CLS, bias="all"),
    ],
}


@dataclass
class Served:
    """What one run of all adapters of a base gave, by name (None: the base)."""

    location: str
    checkpoints: dict[str, Path]
    pooling: str
    values: dict[str | None, NDArray[Any]]
    """Of a task; for CAUSAL_LM the log-probabilities of the first new token."""
    tokens: dict[str | None, list[int]]


def tiny_model(kind: str) -> Any:
    torch.manual_seed(7)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.1}
    if kind == "tiny-gpt2":
        common |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": 1, "eos_token_id": 2}
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=256, **common))
    common["max_position_embeddings"] = 256
    if kind == "tiny-distilbert":
        return AutoModel.from_config(DistilBertConfig(dim=64, hidden_dim=96, n_layers=3, n_heads=4, **common))
    common |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AutoModel.from_config(ElectraConfig(embedding_size=32, **common))


def save_base(kind: str, directory: Path) -> str:
    if kind in ("tiny-llama", "tiny-bert", "tiny-tied-llama"):
        return str(save_tiny_base(kind, directory))
    model = tiny_model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """By base."""
    return cache(lambda base: serve(base, tmp_path_factory.mktemp(base)))


def save_checkpoint(location: str, folder: Path, spec: Spec) -> Path:
    """As the name says in which form."""
    if spec.name == "adalora":
        return make_adalora(location, folder, spec)
    checkpoint = make_adapter(location, folder, spec)
    dtype = getattr(torch, spec.name.rpartition("-")[2], None)
    if isinstance(dtype, torch.dtype):
        rewrite_tensors(checkpoint, lambda t: t.update({key: value.to(dtype) for key, value in t.items()}))
    return checkpoint


def make_adalora(location: str, folder: Path, spec: Spec) -> Path:
    """With ranks allocated: from none in one module to all that it began with."""
    model = MODEL_CLASSES[spec.task].from_pretrained(location, dtype=torch.float32)
    config = AdaLoraConfig(
        task_type=spec.task, target_modules=spec.targets, init_r=spec.rank, target_r=2, total_step=9, lora_alpha=40,
        fan_in_fan_out=spec.options.get("fan_in_fan_out", False),
    )  # fmt: skip
    adapted: Any = get_peft_model(model, config)
    torch.manual_seed(11)
    allocated: dict[str, list[bool]] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.normal_(0, 0.3)
        if "lora_E" in name:
            kept = [i <= len(allocated) - 1 for i in range(spec.rank)]
            allocated[name.removeprefix("base_model.model.")] = kept
    adapted.peft_config["default"].rank_pattern = allocated
    with warnings.catch_warnings(action="ignore", category=PeftWarning):  # it takes a rank of 0 for a fault
        adapted.save_pretrained(str(folder / spec.name))
    return folder / spec.name


def serve(base: str, folder: Path) -> Served:
    location = save_base(base, folder / "base")
    checkpoints = {spec.name: save_checkpoint(location, folder, spec) for spec in KINDS[base]}
    runner = Runner(location, max_loras=64, max_cpu_loras=64, max_num_seqs=64)
    for checkpoint in checkpoints.values():
        runner.load(checkpoint)
    base_task = CAUSAL_LM if runner.base.causal else FEATURE_EXTRACTION
    rows = {}
    for spec in [None, *KINDS[base], None]:
        task, name = (base_task, None) if spec is None else (spec.task, spec.name)
        params = greedy(spec.vocabulary or VOCABULARY if spec else VOCABULARY) if task == CAUSAL_LM else None
        rows[name] = runner.submit(task, prompt_of(spec) if spec else BASE_PROMPT, name, params)
    runner.drain()
    assert max(len(step.counts) for step in runner.engine.steps) == len(rows) + 1, "all must have shared a batch"
    values: dict[str | None, NDArray[Any]] = {}
    for name, row in rows.items():
        first = runner.outputs[row.id][0]
        if first.logprobs is None:
            values[name] = np.asarray(first.values)
        else:
            values[name] = np.array([value for _, value in sorted(first.logprobs.top)])
    tokens = {name: row.output_ids for name, row in rows.items()}
    return Served(location, checkpoints, runner.base.pooling, values, tokens)


CELLS = [(base, spec) for base, specs in KINDS.items() for spec in specs]


@pytest.mark.parametrize(("base", "spec"), CELLS, ids=[f"{base}: {spec.name}" for base, spec in CELLS])
def test_a_checkpoint_gives_what_peft_gives_alone(base: str, spec: Spec, served: Callable[[str], Served]) -> None:
    run = served(base)
    model = peft_model(run.location, run.checkpoints[spec.name], spec.task, spec.labels, spec.vocabulary)
    ids = prompt_of(spec)
    compare(run, spec.name, spec.task, model, ids)
    plain = peft_values(model.unload(), spec.task, ids, run.pooling)
    with_adapter = run.values[spec.name]
    assert relative(with_adapter, log_probabilities(plain) if spec.task == CAUSAL_LM else plain) > 1e-2


@pytest.mark.parametrize("base", KINDS)
def test_rows_of_the_base_stay_its_own(base: str, served: Callable[[str], Served]) -> None:
    run = served(base)
    task = FEATURE_EXTRACTION if KINDS[base][0].task != CAUSAL_LM else CAUSAL_LM
    compare(run, None, task, peft_model(run.location, None, task), BASE_PROMPT)


def compare(run: Served, name: str | None, task: str, model: Any, ids: list[int]) -> None:
    expected = peft_values(model, task, ids, run.pooling)
    if task == CAUSAL_LM:
        assert relative(run.values[name], log_probabilities(expected)) < 1e-4
        assert run.tokens[name] == greedy_tokens(model, ids)
    else:
        assert run.values[name].shape == expected.shape
        assert relative(run.values[name], expected) < 1e-4


def log_probabilities(logits: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(logits - np.logaddexp.reduce(logits.astype(np.float64)))


def greedy_tokens(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()
