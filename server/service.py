"""Service: what the routes ask for. Names become held versions, texts become prompts, outputs become results.

Stands between the HTTP routes and the engine's thread; knows nothing of HTTP. Event loop only, but for `_build`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_checkpoint
from adapters.errors import AdapterError, InvalidAdapter
from adapters.registry import AdapterRegistry, AdapterVersion
from server.bases import BaseNotFound, load_tokenizer, resolve_base
from server.config import ServerConfig
from server.engine import request
from server.engine.async_engine import AsyncEngine, CannotStart, EngineNotReady, EngineState, Stream
from server.engine.base_model import BaseModel, UnsupportedBase, load_base
from server.engine.detokenizer import TextStream
from server.engine.device import DeviceNotAvailable, choose_device
from server.engine.engine import Engine
from server.engine.request import SamplingParams
from server.engine.tasks import Prompt, Tasks
from server.generation import EngineFailed, Generation
from server.metrics import Metrics

logger = logging.getLogger(__name__)

LONG_TEXT_CHARACTERS = 2_000
LOADING_THREADS = 2


class WrongTask(Exception):
    """A task asked of a model that has another; the message says which."""


class PromptTooLong(Exception):
    """A prompt, with what shall follow it, is longer than the context; the message gives both lengths."""


class InvalidParameters(ValueError):
    """Parameters that contradict each other, the model or its task; the message may be shown to the caller."""


class ForbiddenPath(Exception):
    """A path outside the directory from which adapters may be loaded."""


@dataclass(frozen=True)
class LoadedBase:
    """A base model with its tokenizer and its names."""

    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    logical_name: str


class Service:
    """One base model and its adapters, ready to be asked."""

    def __init__(self, config: ServerConfig, load: Callable[[], LoadedBase] | None = None) -> None:
        self.config = config
        self.metrics = Metrics()
        self.async_engine = AsyncEngine(self._build, config.max_waiting)
        self.started_at = int(time.time())
        self._load = load or self._load_configured
        self._loaded: LoadedBase | None = None
        self._tasks: Tasks | None = None
        self._loaders = ThreadPoolExecutor(LOADING_THREADS, "loader")
        """Apart from the threads that tokenise, so that loading holds up nobody."""
        self._add_gauges()

    # What is there

    @property
    def loaded(self) -> LoadedBase:
        """Raises EngineNotReady."""
        if self._loaded is None or self.async_engine.state is not EngineState.READY:
            raise EngineNotReady(self.async_engine.reason)
        return self._loaded

    @property
    def tasks(self) -> Tasks:
        """Raises EngineNotReady."""
        if self._tasks is None:
            raise EngineNotReady(self.async_engine.reason)
        return self._tasks

    @property
    def registry(self) -> AdapterRegistry:
        """Raises EngineNotReady."""
        return self.async_engine.engine.registry

    @property
    def max_model_len(self) -> int:
        return self.async_engine.engine.max_model_len

    def task_of(self, name: str) -> str:
        """The kind of task that `name` (an adapter, or the base) has by itself. Raises AdapterNotFound."""
        if name == self.loaded.name:
            return request.CAUSAL_LM if self.loaded.base.causal else request.FEATURE_EXTRACTION
        return self.registry.get(name).adapter.task_type

    def check_model(self, model: str, task: str) -> None:
        """Before anything is computed for it. Raises AdapterNotFound, WrongTask, EngineNotReady."""
        self._check_task(model, None if model == self.loaded.name else self.registry.get(model), task)

    # Inference

    async def prepare(self, prepare: Callable[[str], Prompt], text: str) -> Prompt:
        """Tokenise; a long text in another thread, so that the event loop goes on."""
        if len(text) < LONG_TEXT_CHARACTERS:
            return prepare(text)
        return await asyncio.to_thread(prepare, text)

    def generate(self, model: str, prompt: Prompt, params: SamplingParams, stop: Sequence[str] = ()) -> Generation:
        """Begin to generate.

        Raises AdapterNotFound, WrongTask, PromptTooLong, InvalidParameters, QueueFull, EngineNotReady.
        """
        stream = self._submit(model, request.CAUSAL_LM, prompt, params)
        return Generation(stream, TextStream(self.loaded.tokenizer, stop), self.metrics)

    async def run(self, model: str, task: str, prompt: Prompt) -> tuple[Any, AdapterVersion | None]:
        """The values of a task that needs one step, and the version that gave them. Raises as `generate`."""
        started = time.monotonic()
        stream = self._submit(model, task, prompt, None)
        try:
            async for output in stream.outputs():
                reason = output.finish_reason or "done"
                self.metrics.sequences.labels(task, reason).inc()
                self.metrics.latency.labels(task).observe(time.monotonic() - started)
                if output.error is not None:
                    raise EngineFailed(output.error)
                return output.values, stream.sequence.version
        finally:
            if stream.close():
                self.metrics.sequences.labels(task, "abort").inc()
        raise EngineFailed("the engine ended without an answer")

    def _submit(self, model: str, task: str, prompt: Prompt, params: SamplingParams | None) -> Stream:
        loaded = self.loaded
        params = self._fit(prompt, params)
        self.async_engine.check_room(1)
        version = None if model == loaded.name else self.registry.acquire(model)
        try:
            self._check_task(model, version, task)
            sequence = request.Sequence(
                self.async_engine.next_id(), task, prompt.token_ids, version, params, loaded.base.eos_ids
            )
            stream = self.async_engine.submit(sequence)
        except Exception:
            if version is not None:
                self.registry.release(version)
            raise
        self.metrics.prompt_tokens.inc(len(prompt.token_ids))
        return stream

    def _fit(self, prompt: Prompt, params: SamplingParams | None) -> SamplingParams | None:
        """`params` with a bound on new tokens, when prompt and answer fit into the context."""
        n, limit = len(prompt.token_ids), self.max_model_len
        if params is None:
            if n > limit:
                raise PromptTooLong(f"the input has {n} tokens, the context holds {limit}")
            return None
        if n >= limit:
            raise PromptTooLong(f"the prompt has {n} tokens, the context holds {limit} with the answer")
        if params.max_tokens == 0:
            params = replace(params, max_tokens=limit - n)
        if n + params.max_tokens > limit:
            raise PromptTooLong(
                f"the prompt has {n} tokens and max_tokens is {params.max_tokens}, the context holds {limit}"
            )
        self._check_parameters(params)
        return params

    def _check_parameters(self, params: SamplingParams) -> None:
        """What the schemas cannot know. Raises InvalidParameters."""
        if params.min_tokens > params.max_tokens:
            raise InvalidParameters(f"min_tokens {params.min_tokens} is more than max_tokens {params.max_tokens}")
        size = self.loaded.base.vocabulary_size
        unknown = sorted(i for i in params.stop_token_ids if i >= size)
        if unknown:
            raise InvalidParameters(f"stop_token_ids {unknown} are outside the vocabulary of {size}")

    def _check_task(self, model: str, version: AdapterVersion | None, task: str) -> None:
        if version is None:
            served = {request.FEATURE_EXTRACTION} | ({request.CAUSAL_LM} if self.loaded.base.causal else set())
        else:
            served = {version.adapter.task_type}
        if task not in served:
            raise WrongTask(f"{model!r} serves {' and '.join(sorted(served))}, not {task}")

    # Adapters

    def path_below_root(self, source: str) -> Path:
        """A directory below the configured root. Raises ForbiddenPath, without telling what is where."""
        root = self.config.root
        if root is None:
            raise ForbiddenPath("no directory is configured from which adapters may be loaded (--adapter-root)")
        try:
            path = (root / source).resolve()
            below = path.is_relative_to(root)
            if below:
                (path / CONFIG_FILE).exists()  # some systems take a name that is too long until it is looked up
        except (OSError, ValueError, RuntimeError) as error:
            raise ForbiddenPath(f"{source[:200]!r} is no path") from error
        if not below:
            raise ForbiddenPath(f"{source[:200]!r} is not below the directory from which adapters may be loaded")
        return path

    async def load_adapter(self, name: str, source: str, replace: bool = True) -> tuple[AdapterVersion, bool]:
        """Serve the checkpoint at `source` as `name`; False when it is served already.

        Raises ForbiddenPath, InvalidName, InvalidAdapter, AdapterExists, RegistryFull.
        """
        registry = self.registry
        registry.check_name(name)
        path = self.path_below_root(source)
        loop = asyncio.get_running_loop()
        layout = self.loaded.base.layout
        limits = self.async_engine.engine.limits
        adapter = await loop.run_in_executor(self._loaders, read_checkpoint, path, layout, limits)
        version, created = registry.put(name, adapter, replace)
        if created:
            logger.info("adapter %s is now %s (%s)", name, version.digest[:12], adapter.task_type)
        return version, created

    def remove_adapter(self, name: str) -> tuple[AdapterVersion, Future[int]]:
        """Stop serving `name` at once; the future has the bytes freed when the last running request has ended."""
        removed = self.registry.remove(name)
        logger.info("adapter %s is removed", name)
        return removed

    # Life

    async def start(self) -> None:
        self.async_engine.start()

    async def stop(self) -> None:
        await self.async_engine.stop()
        self._loaders.shutdown()

    def _build(self) -> Engine:
        """Engine's thread: everything that runs torch before the first step. Raises CannotStart."""
        if self.config.num_threads:
            torch.set_num_threads(self.config.num_threads)
        started = time.monotonic()
        try:
            loaded = self._load()
            engine = Engine(self.config, loaded.base, loaded.name)
            self._tasks = Tasks(loaded.tokenizer)
            self._loaded = loaded
            self._load_directory(engine)
        except (BaseNotFound, UnsupportedBase, DeviceNotAvailable, OSError) as error:
            raise CannotStart(str(error)) from error
        names = [name for name, _ in engine.registry.list()]
        logger.info(
            "ready in %.1f s: base %s, context %d tokens, adapters %s",
            time.monotonic() - started, loaded.name, engine.max_model_len, ", ".join(names) or "none",
        )  # fmt: skip
        return engine

    def _load_configured(self) -> LoadedBase:
        cache = Path(self.config.cache_dir).expanduser() if self.config.cache_dir else None
        source = resolve_base(self.config.base, cache)
        logger.info("loading %s", source.logical_name)
        tokenizer = load_tokenizer(source.location)
        device = choose_device(self.config.device)
        base = load_base(source.location, device, self.config.dtype)
        logger.info("%s in %s on %s", source.logical_name, base.dtype, device)
        return LoadedBase(base, tokenizer, source.name, source.logical_name)

    def _load_directory(self, engine: Engine) -> None:
        """Serve every checkpoint directly under `adapter_dir`; list the broken ones with their reasons."""
        if not self.config.adapter_dir:
            return
        registry, layout = engine.registry, engine.base.layout
        directory = Path(self.config.adapter_dir).expanduser()
        if not directory.is_dir():
            raise FileNotFoundError(f"adapter_dir {self.config.adapter_dir!r} is not a directory")
        for path in sorted(directory.iterdir()):
            try:
                if not any((path / file).exists() for file in (CONFIG_FILE, WEIGHTS_FILE)):
                    continue
                registry.check_name(path.name)
                registry.put(path.name, read_checkpoint(path, layout, engine.limits))
            except (AdapterError, OSError) as error:
                reasons = error.reasons if isinstance(error, InvalidAdapter) else (str(error),)
                registry.refuse(path.name, reasons)
                logger.warning("adapter %s is refused: %s", path.name, error)

    def _add_gauges(self) -> None:
        engine = self.async_engine
        self.metrics.gauge("num_requests_running", "Sequences that run", lambda: engine.num_running)
        self.metrics.gauge("num_requests_waiting", "Sequences that wait", lambda: engine.num_waiting)
        self.metrics.gauge("kv_cache_usage_perc", "Share of KV-cache pages in use", self._cache_usage)
        self.metrics.counter(
            "num_preemptions", "Sequences whose pages were taken back",
            lambda: engine.engine.scheduler.preemptions if engine.state is EngineState.READY else 0,
        )  # fmt: skip
        self.metrics.gauge(
            "adapters", "Adapters that are served",
            lambda: len(self.registry.list()) if engine.state is EngineState.READY else 0,
        )  # fmt: skip

    def _cache_usage(self) -> float:
        if self.async_engine.state is not EngineState.READY:
            return 0.0
        blocks = self.async_engine.engine.scheduler.blocks
        return 1 - blocks.num_free / blocks.num_blocks if blocks.num_blocks else 0.0
