"""ServerConfig: the one frozen object of settings. Flags and environment variables derive from its fields."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENV_PREFIX = "MULTILORA_"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class InvalidConfig(ValueError):
    """A setting outside its range, or two that contradict each other."""


def setting(default: Any, help: str) -> Any:
    """A field with the text that its flag shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ServerConfig:
    """Everything that `multilora serve` can be told. Limits are named as vLLM names them."""

    base: str = setting("smollm2", "the base model: smollm2, minilm, a directory, or a hub id")
    device: str = setting("auto", "where it runs: auto (a GPU where there is one), cpu, cuda")
    dtype: str = setting("auto", "the base in memory: auto (cpu: float32, cuda: 16 bits), float32, float16, bfloat16")
    adapter_dir: str = setting("", "serve every PEFT checkpoint directory directly under this one")
    adapter_root: str = setting("", "adapters may be loaded by path from below this directory (default: adapter-dir)")
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 lets the system choose")
    api_key_file: str = setting("", "who may ask what: keys made by `multilora make-key`; read again when it changes")
    allow_public: bool = setting(False, "listen on an address that is not loopback although there are no API keys")
    max_loras: int = setting(16, "adapters on the device at once")
    max_lora_rank: int = setting(64, "largest rank served")
    max_cpu_loras: int = setting(1024, "adapters in host memory at once; any number lies on disk")
    max_cpu_lora_bytes: int = setting(4 << 30, "host memory for adapters, in bytes")
    max_concurrent_loads: int = setting(2, "adapters that are read from disk at once")
    fairness_tokens: int = setting(
        512, "an adapter that waits for a slot gets one when others were served so many tokens more (outputs count 2)"
    )
    store_dir: str = setting(
        "", "where uploaded adapters are kept, for one server alone (default: $XDG_STATE_HOME/multilora/BASE)"
    )
    arena_cache_bytes: int = setting(
        2 << 30, "disk below store-dir for copies of adapters that are read again, as they lie in memory; 0: none"
    )
    keep_versions: int = setting(3, "versions of an uploaded adapter that are kept for rollback, the current included")
    metrics_max_adapters: int = setting(64, "adapters with metrics of their own; the rest are counted as `other`")
    max_adapter_bytes: int = setting(1 << 30, "largest checkpoint, in bytes")
    max_tokenizers: int = setting(16, "tokenizers of adapters in memory at once, beside the base's")
    max_labels: int = setting(10_000, "labels of one classifier")
    max_num_seqs: int = setting(64, "sequences that run at once")
    max_num_batched_tokens: int = setting(1024, "tokens of one step; longer prompts are computed in chunks")
    max_model_len: int = setting(0, "longest prompt and answer, in tokens (0: what base and cache allow)")
    max_waiting: int = setting(1024, "sequences that wait; more are refused with 429")
    max_items: int = setting(256, "inputs of one request")
    max_body_bytes: int = setting(16 << 20, "largest request body, in bytes")
    request_timeout: int = setting(600, "seconds that a sequence may take, waiting included")
    client_timeout: int = setting(60, "seconds that a client may send nothing of its request, or take no answer")
    drain_timeout: int = setting(30, "seconds that running requests have to finish after SIGTERM")
    block_size: int = setting(16, "tokens of one KV-cache page")
    kv_cache_bytes: int = setting(1 << 30, "memory for the KV cache, in bytes")
    kv_cache_dtype: str = setting(
        "auto",
        "keys and values in the KV cache: auto (as the base; with quantize float16), float32, float16, bfloat16; fewer "
        "bits than the base's may change tokens",
    )
    kernel: str = setting("auto", "how the LoRA term is computed: auto, native (CPU), triton (GPU), torch, reference")
    lora_dtype: str = setting(
        "auto", "adapters in memory: auto (cpu: 16 bits where exact, cuda: as the base), float32, float16, bfloat16"
    )
    pack_weights: bool = setting(True, "store the base's fp32 weights as the processor multiplies them fastest")
    cuda_graphs: bool = setting(
        False, "repeat decode steps as CUDA graphs, captured at start: a GPU waits less for the processor"
    )
    quantize: str = setting(
        "",
        "8-bit weights, and 16-bit keys and values, which may change tokens: int8, or int8-dynamic (8-bit inputs too)",
    )
    num_threads: int = setting(0, "threads of a torch operation (0: one for each core)")
    cache_dir: str = setting("", "where converted bases lie (default: $XDG_CACHE_HOME/multilora)")
    log_level: str = setting("info", "debug, info, warning or error")
    log_format: str = setting("text", "text, or json: an object a line")
    log_requests: bool = setting(True, "a line for each request, with its times and tokens")
    log_prompts: bool = setting(False, "the prompts in it too")

    def __post_init__(self) -> None:
        from adapters.arena import POOL_DTYPES  # noqa: PLC0415  -- `--help` shall not wait for torch
        from adapters.kernels import KERNEL_NAMES  # noqa: PLC0415
        from adapters.products import QUANTIZED  # noqa: PLC0415
        from server.engine.device import DEVICE_NAMES, DTYPES  # noqa: PLC0415

        for name, value, known in (
            ("device", self.device, DEVICE_NAMES),
            ("dtype", self.dtype, ("auto", *DTYPES)),
            ("kernel", self.kernel, KERNEL_NAMES),
            ("kv_cache_dtype", self.kv_cache_dtype, ("auto", *DTYPES)),
            ("lora_dtype", self.lora_dtype, tuple(POOL_DTYPES)),
            ("quantize", self.quantize, ("", *QUANTIZED)),
            ("log_level", self.log_level, ("debug", "info", "warning", "error")),
            ("log_format", self.log_format, ("text", "json")),
        ):
            if value not in known:
                raise InvalidConfig(f"{name} {value!r} is unknown: choose from {', '.join(known)}")
        if self.cuda_graphs and self.device == "cpu":
            raise InvalidConfig("cuda_graphs needs an NVIDIA GPU, not device cpu")
        if self.cuda_graphs and self.kernel not in ("auto", "triton"):
            raise InvalidConfig(f"cuda_graphs captures the Triton kernels: kernel {self.kernel} goes without them")
        zero_allowed = {"arena_cache_bytes", "port", "max_model_len", "num_threads"}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < (item.name not in zero_allowed):
                raise InvalidConfig(f"{item.name} must not be {value}")
        if self.max_cpu_loras < self.max_loras:
            raise InvalidConfig(f"max_cpu_loras {self.max_cpu_loras} must not be less than max_loras {self.max_loras}")
        if self.host not in LOOPBACK and not self.allow_public and not self.api_key_file:
            raise InvalidConfig(
                f"host {self.host} is reachable by others and there are no API keys: set --api-key-file, or add "
                "--allow-public to accept that"
            )

    @property
    def root(self) -> Path | None:
        """The directory below which adapters may be loaded by path."""
        name = self.adapter_root or self.adapter_dir
        return Path(name).expanduser().resolve() if name else None


def add_flags(parser: argparse.ArgumentParser, names: Container[str] | None = None) -> None:
    """One `--flag` for each field of ServerConfig, or for those in `names`; those not given stay unset."""
    types = typing.get_type_hints(ServerConfig)
    for item in dataclasses.fields(ServerConfig):
        if names is not None and item.name not in names:
            continue
        flag = "--" + item.name.replace("_", "-")
        text = f"{item.metadata['help']} [{item.default!r}, ${ENV_PREFIX}{item.name.upper()}]"
        if types[item.name] is bool:
            parser.add_argument(flag, help=text, default=None, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, help=text, default=None, type=types[item.name], metavar="…")


def load_config(arguments: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """Flags over environment over defaults. Raises InvalidConfig."""
    types = typing.get_type_hints(ServerConfig)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(ServerConfig):
        given = arguments.get(item.name)
        text = environment.get(ENV_PREFIX + item.name.upper())
        if given is not None:
            values[item.name] = given
        elif text is not None:
            values[item.name] = _parse(item.name, types[item.name], text)
    return ServerConfig(**values)


def _parse(name: str, kind: type, text: str) -> Any:
    truth: Sequence[str] = ("1", "true", "yes", "on")
    lies: Sequence[str] = ("0", "false", "no", "off", "")
    if kind is bool:
        if text.lower() not in (*truth, *lies):
            raise InvalidConfig(f"${ENV_PREFIX}{name.upper()} must be true or false, not {text!r}")
        return text.lower() in truth
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidConfig(f"${ENV_PREFIX}{name.upper()}: {error}") from error
