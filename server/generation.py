"""Generation: one sequence's text as it grows, from the engine's outputs. Knows nothing of HTTP. Event loop only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from server.engine.async_engine import Stream
from server.engine.detokenizer import TextStream
from server.engine.grammar import InvalidGrammar
from server.engine.request import RequestOutput, TokenLogprobs
from server.tally import Tally


class EngineFailed(Exception):
    """An accepted sequence ended in an error of ours."""


class AdapterLost(Exception):
    """An accepted sequence ended because its adapter's files changed or broke while it waited to be loaded."""


def failure(stream: Stream, message: str) -> Exception:
    """Why a sequence ended without its result."""
    if stream.cut is not None:
        return stream.cut
    version, grammar = stream.sequence.version, stream.sequence.grammar
    if grammar is not None and grammar.failed:
        return InvalidGrammar(message)
    lost = version is not None and version.failure is not None
    return AdapterLost(f"the adapter could not be loaded: {message}") if lost else EngineFailed(message)


@dataclass(frozen=True)
class Delta:
    """What one step added to a generation."""

    text: str
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first one, where they were asked for."""


class Generation:
    """One sequence's text as it grows. Leave it with `close`, however it ends."""

    def __init__(self, stream: Stream, text: TextStream, tally: Tally) -> None:
        self._stream = stream
        self._text = text
        self._tally = tally

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._stream.sequence.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return self._tally.num_tokens

    async def deltas(self) -> AsyncIterator[Delta]:
        """One for each token, or a single one where none is generated; the last has a finish reason.

        Raises EngineFailed, AdapterLost, InvalidGrammar, RequestTimeout, SlowReader.
        """
        async for output in self._stream.outputs():
            if output.error is not None:
                self._tally.end("error")
                raise failure(self._stream, output.error)
            delta = self._take(output)
            yield delta
            if delta.finish_reason is not None:
                break

    def close(self) -> None:
        if self._stream.close():
            self._tally.end("abort")

    def _take(self, output: RequestOutput) -> Delta:
        reason = output.finish_reason
        piece = ""
        if output.token_id is not None:
            self._tally.token()
            piece = "" if reason == "stop" else self._text.push(output.token_id)
        if self._text.stopped:
            reason = "stop"
            self._stream.close()
        if reason is not None:
            piece += self._text.finish()
            self._tally.end(reason)
        return Delta(piece, output.logprobs, reason, output.prompt_logprobs)
