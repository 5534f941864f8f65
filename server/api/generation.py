"""One generating request: its choices, run together, as one answer or as a stream of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from server.engine.calls import Call
from server.engine.request import TokenLogprobs
from server.generation import Delta, Generation

MAX_READY = 64
"""Deltas of one request that wait to be sent; what comes then waits in the sequences' streams, which are bounded."""


@dataclass
class Choice:
    """A finished answer."""

    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.calls += delta.calls
        if delta.logprobs is not None:
            self.logprobs.append(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs


class Choices:
    """Several generations of one request. Leave with `close`, however it ends."""

    def __init__(self, generations: Sequence[Generation], prompts: int) -> None:
        self.generations = generations
        self._prompts = prompts

    def usage(self) -> dict[str, int]:
        """OpenAI's usage: each prompt once, every answer."""
        per_prompt = len(self.generations) // self._prompts
        prompt = sum(g.num_prompt_tokens for g in self.generations[::per_prompt])
        completion = sum(g.num_tokens for g in self.generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def collect(self) -> list[Choice]:
        """All answers, whole."""
        choices = [Choice() for _ in self.generations]
        async for index, delta in self.deltas():
            choices[index].add(delta)
        return choices

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(choice, what was added), as they come. Raises what a generation raises."""
        queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(MAX_READY)
        readers = [asyncio.ensure_future(self._read(i, g, queue)) for i, g in enumerate(self.generations)]
        try:
            for _ in self.generations:
                while True:
                    index, delta = await queue.get()
                    if isinstance(delta, Exception):
                        raise delta
                    yield index, delta
                    if delta.finish_reason is not None:
                        break
        finally:
            for reader in readers:
                reader.cancel()
            self.close()

    def close(self) -> None:
        for generation in self.generations:
            generation.close()

    async def _read(
        self, index: int, generation: Generation, queue: asyncio.Queue[tuple[int, Delta | Exception]]
    ) -> None:
        try:
            async for delta in generation.deltas():
                await queue.put((index, delta))
        except Exception as error:
            await queue.put((index, error))
