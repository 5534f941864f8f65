"""Generation: one sequence's text as it grows, from the engine's outputs. Knows nothing of HTTP. Event loop only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from server.engine.async_engine import Stream
from server.engine.calls import Call, CallParser, Parsed
from server.engine.detokenizer import TextStream
from server.engine.grammar import Grammar, InvalidGrammar
from server.engine.request import RequestOutput, TokenLogprobs
from server.tally import Tally
from server.tools import ToolUse


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
class Form:
    """What one text is held to, and what is read out of it."""

    grammar: Grammar | None = None
    """Of this text alone."""
    tools: ToolUse | None = None

    def copy(self) -> Form:
        """Another text's."""
        return self if self.grammar is None else replace(self, grammar=self.grammar.copy())


FREE = Form()


@dataclass(frozen=True)
class Delta:
    """What one step added to a generation."""

    text: str
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    calls: list[Call] = field(default_factory=list)
    """Those that became complete."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first one, where they were asked for."""

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.finish_reason or self.logprobs or self.calls or self.prompt_logprobs)


class Generation:
    """One sequence's text as it grows. Leave it with `close`, however it ends."""

    def __init__(self, stream: Stream, text: TextStream, tally: Tally, parser: CallParser | None = None) -> None:
        """parser: where the text may hold calls of functions."""
        self._stream = stream
        self._text = text
        self._tally = tally
        self._parser = parser

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._stream.sequence.given)

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
        if self._parser is None:
            return Delta(piece, output.logprobs, reason, prompt_logprobs=output.prompt_logprobs)
        parsed = self._parser.push(piece)
        if reason is not None:
            rest = self._parser.finish(ended=reason == "stop")
            parsed = Parsed(parsed.text + rest.text, parsed.calls + rest.calls)
            reason = "tool_calls" if reason == "stop" and self._parser.num_calls else reason
        return Delta(parsed.text, output.logprobs, reason, parsed.calls)
