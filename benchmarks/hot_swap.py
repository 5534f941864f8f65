"""Hot swap: clients ask eight adapters while each is replaced again and again; then every answer is judged.

An answer is explained when exactly one version gives it, that version is the one in its x-adapter-digest header, and
the name pointed at that version at some moment between the question and its answer. What a version alone gives is asked
afterwards as `name@digest`, when nothing else runs. Speaks HTTP only; the test and the benchmark share it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file, save
from torch import Tensor

CLIENTS = 32
ROUTES = {"chat": "/v1/chat/completions", "complete": "/v1/completions", "classify": "/v1/classify"}
SAME_SCORES = 1e-5
"""Probabilities in fp32 differ by less, whatever else is in the batch."""
ANSWERS_EACH = 2
"""A version is replaced when it has given so many."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
Value = str | tuple[float, ...]


@dataclass(frozen=True)
class Question:
    """What is asked of one adapter; greedy."""

    route: str
    text: str
    max_tokens: int = 0
    """None for a classification."""

    def body(self, model: str, stream: bool) -> dict[str, Any]:
        if self.route == "classify":
            return {"model": model, "input": self.text}
        asked = (
            {"messages": [{"role": "user", "content": self.text}]} if self.route == "chat" else {"prompt": self.text}
        )
        return {
            "model": model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **asked,
        }


@dataclass(frozen=True)
class Answer:
    """What came back, and between which versions of its adapter."""

    question: Question
    value: Value
    digest: str
    first: int
    """The version that was current for certain when it was asked, as a number."""
    last: int
    """The last one whose upload had begun when the answer was complete."""


@dataclass
class Swapped:
    """One adapter, and its versions in the order in which they are put."""

    name: str
    questions: Sequence[Question]
    tensors: Mapping[str, Tensor]
    config: bytes
    digests: list[str] = field(default_factory=list)
    """Of what was put; its length is one more than the number of the current version, for certain."""
    begun: int = 0
    """Uploads that have begun."""
    answers: list[Answer] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Answers, by digest."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, name: str, checkpoint: Path, questions: Sequence[Question], strength: float = 1.0) -> Swapped:
        """strength: of every B, so that versions answer differently."""
        tensors = {k: v * strength if "lora_B" in k else v for k, v in load_file(checkpoint / WEIGHTS_FILE).items()}
        return cls(name, questions, tensors, (checkpoint / CONFIG_FILE).read_bytes())

    def files(self, number: int) -> dict[str, tuple[str, bytes]]:
        """A version's checkpoint: the rows of every B are moved on by its number."""
        moved = {k: v.roll(number, 0) if "lora_B" in k else v for k, v in self.tensors.items()}
        return {file: (file, data) for file, data in ((CONFIG_FILE, self.config), (WEIGHTS_FILE, save(moved)))}

    async def put_next(self, client: httpx.AsyncClient) -> None:
        files = await asyncio.to_thread(self.files, self.begun)
        self.begun += 1
        answer = await client.put(f"/v1/adapters/{self.name}", files=files)
        assert answer.status_code == 201, answer.text
        self.digests.append(answer.headers["x-adapter-digest"])


class HotSwap:
    """Eight adapters (or as many as are given), their clients, and who replaces them."""

    def __init__(self, url: str, adapters: Sequence[Swapped], seed: int = 0) -> None:
        self.adapters = adapters
        self._url = url
        self._random = random.Random(seed)

    def run(self, replacements: int) -> None:
        """Replace each adapter so often while the clients ask. Raises when any request fails."""
        asyncio.run(self._run(replacements))

    async def _run(self, replacements: int) -> None:
        limits = httpx.Limits(max_connections=CLIENTS + len(self.adapters))
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as client:
            for adapter in self.adapters:
                adapter.answered = asyncio.Event()  # an event belongs to one loop
                if not adapter.digests:
                    await adapter.put_next(client)
            over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(CLIENTS):
                    tasks.create_task(self._ask(client, over))
                replacing = [tasks.create_task(self._replace(client, a, replacements)) for a in self.adapters]
                await asyncio.gather(*replacing)
                over.set()

    async def _ask(self, client: httpx.AsyncClient, over: asyncio.Event) -> None:
        """One client, until it is over."""
        while not over.is_set():
            adapter = self._random.choice(self.adapters)
            question = self._random.choice(adapter.questions)
            stream = question.route != "classify" and self._random.random() < 0.5
            first = len(adapter.digests) - 1
            value, digest = await ask(client, question, adapter.name, stream)
            adapter.answers.append(Answer(question, value, digest, first, adapter.begun - 1))
            adapter.counts[digest] += 1
            adapter.answered.set()

    async def _replace(self, client: httpx.AsyncClient, adapter: Swapped, count: int) -> None:
        for number in range(count + 1):
            while adapter.counts[adapter.digests[-1]] < ANSWERS_EACH:
                adapter.answered.clear()
                await adapter.answered.wait()
            if number < count:
                await adapter.put_next(client)

    # Judging

    def judge(self) -> Judgement:
        """Compare every answer with what each version alone gives, now that nothing else runs."""
        judgement = Judgement()
        for adapter in self.adapters:
            _judge(adapter, asyncio.run(self._alone(adapter)), judgement)
        return judgement

    async def _alone(self, adapter: Swapped) -> dict[tuple[Question, str], Value]:
        """What each version gives to each question: one version after another."""
        found: dict[tuple[Question, str], Value] = {}
        async with httpx.AsyncClient(base_url=self._url, timeout=300) as client:
            for digest in adapter.digests:
                model = f"{adapter.name}@{digest}"
                answers = await asyncio.gather(*(ask(client, q, model, stream=False) for q in adapter.questions))
                assert {by for _, by in answers} == {digest}
                found |= {(q, digest): value for q, (value, _) in zip(adapter.questions, answers, strict=True)}
        return found


@dataclass
class Judgement:
    """What became of all answers."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    """Not what the version in the header gives."""
    ambiguous: list[str] = field(default_factory=list)
    """What another version of the adapter gives, too."""
    untimely: list[str] = field(default_factory=list)
    """By a version that was not current between question and answer."""
    late: int = 0
    """By a version that had been replaced, or was being replaced, when the answer was complete."""


def _judge(adapter: Swapped, alone: Mapping[tuple[Question, str], Value], judgement: Judgement) -> None:
    numbers = {digest: number for number, digest in enumerate(adapter.digests)}
    assert len(numbers) == len(adapter.digests), "two versions have the same content"
    for answer in adapter.answers:
        judgement.answers += 1
        giving = [d for d in adapter.digests if same(alone[answer.question, d], answer.value)]
        what = f"{adapter.name} {answer}"
        if answer.digest not in giving:
            judgement.wrong.append(f"{what}, alone {alone.get((answer.question, answer.digest))!r}")
        if len(giving) > 1:
            judgement.ambiguous.append(f"{what}, given by {giving}")
        if not answer.first <= numbers.get(answer.digest, -1) <= answer.last:
            judgement.untimely.append(what)
        judgement.late += numbers.get(answer.digest, -1) < answer.last


def same(a: Value, b: Value) -> bool:
    """Of two answers: the same text, or scores as equal as fp32 has them."""
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return all(abs(x - y) <= SAME_SCORES for x, y in zip(a, b, strict=True))


async def ask(client: httpx.AsyncClient, question: Question, model: str, stream: bool) -> tuple[Value, str]:
    """The answer, and the digest in its header. Raises when it fails, or ends before its end."""
    body = question.body(model, stream)
    if stream:
        return await _ask_stream(client, question, body)
    answer = await client.post(ROUTES[question.route], json=body)
    assert answer.status_code == 200, answer.text
    digest, content = answer.headers["x-adapter-digest"], answer.json()
    if question.route == "classify":
        return tuple(content["data"][0]["probs"]), digest
    choice = content["choices"][0]
    assert choice["finish_reason"] in ("stop", "length")
    return choice["message"]["content"] if question.route == "chat" else choice["text"], digest


async def _ask_stream(client: httpx.AsyncClient, question: Question, body: dict[str, Any]) -> tuple[Value, str]:
    text, ended = "", []
    async with client.stream("POST", ROUTES[question.route], json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended.append("done")
                continue
            choice = json.loads(line[6:])["choices"][0]
            text += (choice["delta"].get("content") or "") if question.route == "chat" else choice["text"]
            if choice["finish_reason"] is not None:
                ended.append(choice["finish_reason"])
    assert ended in (["stop", "done"], ["length", "done"]), ended
    return text, answer.headers["x-adapter-digest"]
