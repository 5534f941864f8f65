"""Service: what the routes ask for. Names become held versions, texts become prompts, outputs become results.

Stands between the HTTP routes and the engine's thread; knows nothing of HTTP. Event loop only, but for `_build`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapters.errors import StoreInUse
from adapters.registry import AdapterRegistry, Entry
from adapters.version import AdapterVersion
from server.bases import BaseNotFound, load_tokenizer, resolve_base
from server.composition import parts_of
from server.config import ServerConfig
from server.context import RequestContext, current
from server.engine import request
from server.engine.async_engine import AsyncEngine, CannotStart, EngineNotReady, EngineState, Stream
from server.engine.base_model import BaseModel, UnsupportedBase, load_base
from server.engine.detokenizer import TextStream
from server.engine.device import DeviceNotAvailable, choose_device
from server.engine.engine import Engine
from server.engine.grammar import Grammar
from server.engine.request import SamplingParams
from server.engine.tasks import Prompt
from server.gauges import add_gauges
from server.generation import FREE, EngineFailed, Form, Generation, failure
from server.languages import Language, Languages
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.own_tokenizers import ExaminedTokenizers
from server.tally import Tally

logger = logging.getLogger(__name__)

COMPOSED = "composed"
"""Under which compositions are counted: there are as many as weights."""
LONG_TEXT_CHARACTERS = 2_000
SHOWN_NAMES = 20


class WrongTask(Exception):
    """A task asked of a model that has another; the message says which."""


class PromptTooLong(Exception):
    """A prompt, with what shall follow it, is longer than the context; the message gives both lengths."""


class InvalidParameters(ValueError):
    """Parameters that contradict each other, the model or its task; the message may be shown to the caller."""


@dataclass(frozen=True)
class LoadedBase:
    """A base model with its tokenizer and its names."""

    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    logical_name: str

    @cached_property
    def language(self) -> Language:
        """That of its texts, and of adapters that bring none."""
        base, stacks = self.base, self.base.stacks
        start_ids = stacks.start_ids if stacks else ()
        return Language(self.tokenizer, base.vocabulary_size, base.eos_ids, base.input_vocabulary_size, start_ids)


@dataclass
class Held:
    """What answers one request, from its beginning to its end."""

    name: str
    version: AdapterVersion | None
    """None: the base model."""
    task: str
    """The kind of task that it has by itself."""
    language: Language
    priority: int = 0
    """Of its sequences; lower goes first."""
    expected: bool = True
    """Whether its first sequence is still to come."""


class Service:
    """One base model and its adapters, ready to be asked."""

    def __init__(self, config: ServerConfig, load: Callable[[], LoadedBase] | None = None) -> None:
        self.config = config
        self.metrics = Metrics(config.metrics_max_adapters)
        self.async_engine = AsyncEngine(self._build, config.max_waiting, config.request_timeout)
        self.started_at = int(time.time())
        self._load = load or self._load_configured
        self._loaded: LoadedBase | None = None
        self._languages: Languages | None = None
        self._lifecycle = Lifecycle(config, lambda: self.async_engine.num_running > 0, self.async_engine.wake)
        self._num_aside = 0
        """Requests that wait for the first reading of their adapter."""
        self._beginning: asyncio.Task[None] | None = None
        add_gauges(self.metrics, self.async_engine, config.max_loras)

    # What is there

    @property
    def loaded(self) -> LoadedBase:
        """Raises EngineNotReady."""
        if self._loaded is None or self.async_engine.state is not EngineState.READY:
            raise EngineNotReady(self.async_engine.reason)
        return self._loaded

    @property
    def languages(self) -> Languages:
        """Raises EngineNotReady."""
        if self._languages is None:
            raise EngineNotReady(self.async_engine.reason)
        return self._languages

    @property
    def registry(self) -> AdapterRegistry:
        """Raises EngineNotReady."""
        return self.async_engine.engine.registry

    @property
    def lifecycle(self) -> Lifecycle:
        """Raises EngineNotReady."""
        if self.async_engine.state is not EngineState.READY:
            raise EngineNotReady(self.async_engine.reason)
        return self._lifecycle

    @property
    def max_model_len(self) -> int:
        return self.async_engine.engine.max_model_len

    def look_up(self, model: str) -> Entry | None:
        """What `model` means now; None: the base model.

        Raises Forbidden, AdapterNotFound, AdapterRefused, EngineNotReady.
        """
        current().caller.check_use(model)
        return None if model == self.loaded.name else self.lifecycle.look_up(model)

    def check_model(self, model: str, *tasks: str) -> None:
        """Before anything is computed for it: that it serves one of `tasks`. Raises WrongTask, and as `look_up`."""
        entry = self.look_up(model)
        if entry is None or entry.info.task_type:
            self._check_task(model, entry, tasks)

    # Inference

    async def prepare(self, prepare: Callable[[str], Prompt], text: str) -> Prompt:
        """Tokenise; a long text in another thread, so that the event loop goes on."""
        if len(text) < LONG_TEXT_CHARACTERS:
            return prepare(text)
        return await asyncio.to_thread(prepare, text)

    @asynccontextmanager
    async def hold(self, model: str, *tasks: str, priority: int = 0) -> AsyncIterator[Held]:
        """The version that `model` means now, for all of one request; it begins to be loaded if need be.

        tasks: one of which it must serve; none: whatever it serves.

        Raises Forbidden, AdapterNotFound, AdapterRefused, AdapterLost, VersionNotFound, WrongTask, EngineNotReady.
        """
        loaded = self.loaded
        current().caller.check_use(model)
        if model == loaded.name:
            version, kind = None, loaded.base.layout.tasks[0]
        else:
            version = await self._acquire(model)
            kind = version.info.task_type
        name = model if parts_of(model) else model.partition("@")[0]
        held = Held(name, version, kind, loaded.language, priority)
        try:
            held.language = await self.languages.of(version)
            if tasks:
                self._check_task(model, version, tasks)
            yield held
        finally:
            if version is not None:
                self._expect_no_more(held)
                self.registry.release(version)

    def _expect_no_more(self, held: Held) -> None:
        """The sequences speak for themselves from now on: the request need not keep its adapter in memory."""
        if held.version is not None and held.expected:
            self.registry.unexpect(held.version)
        held.expected = False

    async def _acquire(self, model: str) -> AdapterVersion:
        self._num_aside += 1
        try:
            version = await self.lifecycle.acquire(model)
            self.registry.expect(version)
            return version
        finally:
            self._num_aside -= 1

    def check_room(self, count: int) -> None:
        """Raises QueueFull when `count` more sequences of who asks now may not wait."""
        caller = current().caller
        self.async_engine.check_room(count + self._num_aside, caller.name, caller.queue_share)

    def generate(
        self,
        held: Held,
        prompt: Prompt,
        params: SamplingParams,
        stop: Sequence[str] = (),
        form: Form = FREE,
    ) -> Generation:
        """Begin to generate. form: of this sequence alone, its grammar from the held `language`.

        Raises InvalidPrompt, PromptTooLong, InvalidParameters, QueueFull, EngineNotReady.
        """
        grammar, tools = form.grammar, form.tools
        if grammar is not None and (params.min_tokens or params.ignore_eos):
            raise InvalidParameters(
                "min_tokens and ignore_eos do not go with a structured output, which ends when complete"
            )
        stream, tally = self._submit(held, held.task, prompt, params, grammar)
        text = TextStream(held.language.tokenizer, stop, () if tools is None else tools.markup.skipped)
        return Generation(stream, text, tally, None if tools is None else tools.parser())

    async def run(self, held: Held, task: str, prompt: Prompt) -> Any:
        """The values of a task that needs one step. Raises as `generate`."""
        stream, tally = self._submit(held, task, prompt, None)
        try:
            async for output in stream.outputs():
                tally.end(output.finish_reason or "done")
                if output.error is not None:
                    raise failure(stream, output.error)
                return output.values
        finally:
            if stream.close():
                tally.end("abort")
        raise EngineFailed("the engine ended without an answer")

    def _submit(
        self, held: Held, task: str, prompt: Prompt, params: SamplingParams | None, grammar: Grammar | None = None
    ) -> tuple[Stream, Tally]:
        version = held.version
        params = self._fit(held, prompt, params)
        self.check_room(1)
        if version is not None:
            self.registry.hold(version)
        try:
            sequence = request.Sequence(
                self.async_engine.next_id(), task, prompt.token_ids, version, params, held.language.eos_ids, grammar,
                held.priority, current().caller.name,
            )  # fmt: skip
            if task == request.SEQ_2_SEQ_LM:
                assert self.loaded.base.stacks is not None
                sequence.source_ids, sequence.prompt_ids = prompt.token_ids, _start_of(held, prompt)
                sequence.forbidden = self.loaded.base.stacks.forbidden
            stream = self.async_engine.submit(sequence)
        except Exception:
            if version is not None:
                self.registry.release(version)
            raise
        self._expect_no_more(held)
        return stream, Tally(self.metrics, self._account(held, prompt), sequence, self._label(held))

    def _account(self, held: Held, prompt: Prompt) -> RequestContext:
        """Whose sequence this is."""
        context = current()
        context.models[held.name] = held.version.digest if held.version else None
        if self.config.log_prompts:
            context.prompts.append(prompt.text or held.language.decode(prompt.token_ids))
        return context

    def _label(self, held: Held) -> str:
        """Of its metrics. The base model is not among those that are bounded."""
        if held.version is None:
            return held.name
        return self.metrics.adapter(COMPOSED if parts_of(held.name) else held.name)

    def room_for(self, held: Held, prompt: Prompt) -> int:
        """How many tokens may be generated for a prompt; less than 1: none."""
        before = len(_start_of(held, prompt) if held.task == request.SEQ_2_SEQ_LM else prompt.token_ids)
        return self.max_model_len - before

    def _fit(self, held: Held, prompt: Prompt, params: SamplingParams | None) -> SamplingParams | None:
        """`params` with a bound on new tokens, when prompt and answer fit into vocabulary and context."""
        n, limit = len(prompt.token_ids), self.max_model_len
        held.language.check_token_ids(prompt.token_ids)  # a tokenizer may have tokens that the embedding lacks
        if (params is None or held.task == request.SEQ_2_SEQ_LM) and n > limit:
            raise PromptTooLong(f"the input has {n} tokens, the context holds {limit}")
        if params is None:
            return None
        n = limit - self.room_for(held, prompt)
        if n >= limit and params.max_tokens != 0:
            raise PromptTooLong(f"the prompt has {n} tokens, the context holds {limit} with the answer")
        if params.max_tokens == request.AS_MANY_AS_FIT:
            params = replace(params, max_tokens=limit - n)
        if n + params.max_tokens > limit:
            raise PromptTooLong(
                f"the prompt has {n} tokens and max_tokens is {params.max_tokens}, the context holds {limit}"
            )
        _check_parameters(params, held.language.vocabulary_size)
        return params

    def _check_task(self, model: str, entry: Entry | None, tasks: Sequence[str]) -> None:
        if entry is None:  # a base has no heads
            served = set(self.loaded.base.layout.tasks) - {request.SEQ_CLS, request.TOKEN_CLS}
        else:
            served = {entry.info.task_type}
        if not served & set(tasks):
            raise WrongTask(f"{model!r} serves {' and '.join(sorted(served))}, not {' or '.join(tasks)}")

    # Life

    async def start(self) -> None:
        self.async_engine.start()
        self._beginning = asyncio.create_task(self._begin())

    async def stop(self) -> None:
        if self._beginning is not None:
            self._beginning.cancel()
        await self.async_engine.stop()
        await self._lifecycle.stop()

    async def _begin(self) -> None:
        await self.async_engine.wait_started()
        if self.async_engine.state is EngineState.READY:
            self._lifecycle.begin()

    def _build(self) -> Engine:
        """Engine's thread: everything that runs torch before the first step. Raises CannotStart."""
        if self.config.num_threads:
            torch.set_num_threads(self.config.num_threads)
        started = time.monotonic()
        try:
            loaded = self._load()
            engine = Engine(self.config, loaded.base, loaded.name, ExaminedTokenizers(loaded.tokenizer))
            self._languages = Languages(loaded.language, self.config.max_tokenizers)
            engine.registry.host.loaded = self.metrics.load_seconds.observe
            engine.observe_step = self.metrics.step_tokens.observe
            self._lifecycle.open(engine, loaded.name)
            self._loaded = loaded
        except (BaseNotFound, UnsupportedBase, DeviceNotAvailable, StoreInUse, OSError) as error:
            raise CannotStart(str(error)) from error
        names = [name for name, _ in engine.registry.list()]
        more = len(names) - SHOWN_NAMES
        logger.info(
            "ready in %.1f s: base %s, context %d tokens, adapters %s%s",
            time.monotonic() - started, loaded.name, engine.max_model_len,
            ", ".join(names[:SHOWN_NAMES]) or "none", f" and {more} more" if more > 0 else "",
        )  # fmt: skip
        return engine

    def _load_configured(self) -> LoadedBase:
        cache = Path(self.config.cache_dir).expanduser() if self.config.cache_dir else None
        source = resolve_base(self.config.base, cache)
        logger.info("loading %s", source.logical_name)
        with ThreadPoolExecutor(1, "tokenizer") as apart:  # what that frees would lie between activations
            tokenizer = apart.submit(load_tokenizer, source.location).result()
        device = choose_device(self.config.device)
        if self.config.cuda_graphs and device.type != "cuda":
            raise DeviceNotAvailable("cuda_graphs needs an NVIDIA GPU, and a torch that was built for it")
        base = load_base(source.location, device, self.config.dtype)
        logger.info("%s in %s on %s", source.logical_name, base.dtype, device)
        return LoadedBase(base, tokenizer, source.name, source.logical_name)


def _start_of(held: Held, prompt: Prompt) -> list[int]:
    """What the target of a source begins with."""
    return list(held.language.start_ids if prompt.start_ids is None else prompt.start_ids)


def _check_parameters(params: SamplingParams, vocabulary_size: int) -> None:
    """What the schemas cannot know. Raises InvalidParameters."""
    if params.min_tokens > params.max_tokens:
        raise InvalidParameters(f"min_tokens {params.min_tokens} is more than max_tokens {params.max_tokens}")
    given = {"stop_token_ids": params.stop_token_ids, "logit_bias": [token for token, _ in params.logit_bias]}
    for field, ids in given.items():
        unknown = sorted(i for i in ids if i >= vocabulary_size)
        if unknown:
            raise InvalidParameters(f"{field}: {unknown} are outside the vocabulary of {vocabulary_size}")
