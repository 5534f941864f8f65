"""What many tests need: tiny bases built in memory, PEFT adapters made for them, PEFT as the oracle, a live server."""

from __future__ import annotations

import asyncio
import atexit
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from adapters.checkpoint import read_checkpoint
from server.api.app import create_app
from server.api.connections import connection_class
from server.config import ServerConfig
from server.engine.base_model import load_base
from server.engine.engine import Engine
from server.engine.request import CAUSAL_LM, RequestOutput, SamplingParams
from server.engine.request import Sequence as EngineSequence
from server.service import LoadedBase, Service

STORES = Path(mkdtemp())
"""What servers of tests keep, each in a directory of its own; removed at the end."""
atexit.register(shutil.rmtree, STORES, ignore_errors=True)
MODEL_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "user: assistant: system: 0123456789", "naïve café 日本語 🙂"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, a few merges, a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_base(kind: str, directory: Path) -> Path:
    """A random tiny Llama or BERT with its tokenizer, as a transformers directory."""
    torch.manual_seed(7)
    model: Any
    if kind in ("tiny-llama", "tiny-tied-llama"):
        config = LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            initializer_range=0.1, architectures=["LlamaForCausalLM"], tie_word_embeddings=kind == "tiny-tied-llama",
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        bert = BertConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=256, pad_token_id=0, initializer_range=0.1, architectures=["BertModel"],
        )  # fmt: skip
        model = BertModel(bert)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Spec:
    """One PEFT adapter to make."""

    name: str
    task: str
    rank: int
    targets: list[str] | str
    labels: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    """To which the base's is resized for it; 0: it stays."""


TINY_ADAPTERS = (
    Spec("chat-a", "CAUSAL_LM", 4, ["q_proj", "v_proj"]),
    Spec("chat-b", "CAUSAL_LM", 8, "all-linear"),
    Spec("sort", "SEQ_CLS", 8, ["q_proj", "v_proj"], labels=3),
    Spec("tag", "TOKEN_CLS", 16, ["q_proj", "o_proj"], labels=4),
    Spec("embed", "FEATURE_EXTRACTION", 8, ["up_proj", "down_proj"]),
)
"""One of each kind (two that chat) for the tiny Llama."""


def make_adapter(location: str | Path, directory: Path, spec: Spec, scale: float = 1.0) -> Path:
    """Save a random, visible adapter for the base at `location`, as `peft` writes it."""
    torch.manual_seed(sum(map(ord, spec.name)))
    options: dict[str, Any] = {"num_labels": spec.labels} if spec.labels else {}
    config = AutoConfig.from_pretrained(location, **options)
    model = MODEL_CLASSES[spec.task].from_pretrained(location, config=config, dtype=torch.float32)
    if spec.vocabulary:
        model.resize_token_embeddings(spec.vocabulary, mean_resizing=False)
    heads = [name for name in ("score", "classifier") if hasattr(model, name)]
    lora = LoraConfig(
        task_type=spec.task,
        r=spec.rank,
        target_modules=spec.targets,
        init_lora_weights=False,
        **{"lora_alpha": 2 * spec.rank, "modules_to_save": heads if spec.labels else None, **deepcopy(spec.options)},
    )
    peft_model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(scale if "lora_B" in name else 1.0)
                if any(part in name for part in ("bias", "modules_to_save", "trainable_tokens")):
                    parameter.normal_(0, 0.3)
                if "lora_magnitude_vector" in name:
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
    target = directory / spec.name
    peft_model.save_pretrained(str(target))
    return target


def peft_model(location: str | Path, checkpoint: Path | None, task: str, labels: int = 0, vocabulary: int = 0) -> Any:
    """The oracle: the base, resized where it is so for the adapter, with that alone, evaluated by peft."""
    options: dict[str, Any] = {"num_labels": labels} if labels else {}
    config = AutoConfig.from_pretrained(location, **options)
    base = MODEL_CLASSES[task].from_pretrained(location, config=config, dtype=torch.float32)
    if vocabulary:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = base if checkpoint is None else PeftModel.from_pretrained(base, checkpoint)
    return model.eval()


@torch.no_grad()
def peft_values(model: Any, task: str, ids: list[int], pooling: str) -> np.ndarray[Any, Any]:
    """What peft gives for one unpadded row: logits, or the pooled and normalised vector."""
    inputs = torch.tensor([ids])
    output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    if task == "FEATURE_EXTRACTION":
        hidden = output.last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[pooling]
        return np.asarray(torch.nn.functional.normalize(vector, dim=0))
    if task == "CAUSAL_LM":
        return np.asarray(output.logits[0, -1])
    return np.asarray(output.logits[0])


def relative(a: Any, b: Any) -> float:
    """max |a − b| / max |b|."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


class Runner:
    """An engine driven by hand: submit, then step until all have ended."""

    def __init__(self, location: str | Path, name: str = "base", **settings: Any) -> None:
        self.config = ServerConfig(**{"max_loras": 8, "kv_cache_bytes": 64 << 20, **settings})
        self.base = load_base(str(location))
        self.engine = Engine(self.config, self.base, name)
        self.outputs: dict[int, list[RequestOutput]] = {}
        self._next = 0

    def load(self, checkpoint: Path, name: str | None = None) -> None:
        adapter = read_checkpoint(checkpoint, self.base.layout, self.engine.limits)
        self.engine.registry.put(name or checkpoint.name, adapter)

    def submit(
        self, task: str, ids: Sequence[int], adapter: str | None = None, params: SamplingParams | None = None
    ) -> EngineSequence:
        """ids: the prompt; on an encoder-decoder what its encoder reads."""
        version = self.engine.registry.acquire(adapter) if adapter else None
        stacks = self.base.stacks
        if stacks is not None:
            sequence = EngineSequence(
                self._next, task, list(stacks.start_ids), version, params, self.base.eos_ids,
                source_ids=list(ids), forbidden=stacks.forbidden,
            )  # fmt: skip
            return self._add(sequence)
        if task == CAUSAL_LM and params is None:
            params = SamplingParams(max_tokens=1, temperature=0.0)
        return self._add(EngineSequence(self._next, task, list(ids), version, params, self.base.eos_ids))

    def _add(self, sequence: EngineSequence) -> EngineSequence:
        self._next += 1
        self.outputs[sequence.id] = []
        self.engine.add(sequence)
        return sequence

    def drain(self) -> None:
        while self.engine.scheduler.unfinished():
            for output in self.engine.step():
                self.outputs[output.sequence.id].append(output)
            self.engine.scheduler.check_integrity()

    def values(self, sequence: EngineSequence) -> Any:
        return self.outputs[sequence.id][-1].values


def random_ids(count: int, seed: int, vocabulary: int = 320) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def rewrite_tensors(checkpoint: Path, change: Any) -> None:
    """Apply `change` to the dict of tensors of a saved adapter."""
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


class _Server(uvicorn.Server):
    """Tells when it listens, so that nobody has to poll."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.listening.set()


@dataclass
class Live:
    """A server on a real socket."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop

    def wait_started(self) -> None:
        """Until the engine is ready, or has failed."""
        asyncio.run_coroutine_threadsafe(self.service.async_engine.wait_started(), self.loop).result(120)


@contextmanager
def live_server(service: Service, wait: bool = True) -> Iterator[Live]:
    """Serve `service` on 127.0.0.1 from a thread, until the block ends."""
    http = connection_class(service.config.client_timeout)
    config = uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_level="warning", http=http)
    server = _Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.listening.wait(60)
        assert server.loop is not None
        port = server.servers[0].sockets[0].getsockname()[1]
        running = Live(f"http://127.0.0.1:{port}", service, server.loop)
        if wait:
            running.wait_started()
        yield running
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def service_for(location: str | Path, name: str, **settings: Any) -> Service:
    """A service on a base directory, loaded in the engine's thread as in production."""
    settings = {"max_loras": 8, "kv_cache_bytes": 64 << 20, "store_dir": mkdtemp(dir=STORES), **settings}
    config = ServerConfig(base=str(location), **settings)

    def load() -> LoadedBase:
        from server.bases import load_tokenizer

        return LoadedBase(load_base(str(location)), load_tokenizer(str(location)), name, name)

    return Service(config, load)
