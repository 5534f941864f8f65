"""TextStream: token ids of one sequence -> text, piece by piece, ended by stop strings.

Knows nothing of the engine. A multi-byte character is never split across pieces, and nothing of a stop string leaks,
also not when it spans several tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The growing text of one sequence."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), shown: Collection[int] = ()
    ) -> None:
        """shown: special tokens whose text belongs to the answer; all others are left out."""
        self._tokenizer = tokenizer
        self._skip = not shown
        self._hidden = _special(tokenizer) - set(shown) if shown else frozenset()
        self._stream = DecodeStream(skip_special_tokens=self._skip) if tokenizer.is_fast else None
        self._stop = tuple(stop)
        self._held_back = max((len(s) for s in self._stop), default=1) - 1
        self._ids: list[int] = []
        self._text = ""
        self._sent = 0
        self.stopped = False
        """A stop string was met; `text` ends before it."""

    @property
    def text(self) -> str:
        return self._text

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now."""
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        self._grow(self._next(token_id))
        certain = len(self._text) if self.stopped else len(self._text) - self._held_back
        return self._send(certain)

    def _next(self, token_id: int) -> str:
        """What the text grew by. A tokenizer in Python decodes all of it again."""
        if self._stream is not None:
            return self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
        whole = self._decoded().rstrip(UNFINISHED)
        return whole[len(self._text) :] if whole.startswith(self._text) else ""

    def _decoded(self) -> str:
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        assert isinstance(whole, str)
        return whole

    def finish(self) -> str:
        """No more tokens: return the rest, with what an unfinished character decodes to."""
        if not self.stopped:
            whole = self._decoded()
            if whole.startswith(self._text):
                self._grow(whole[len(self._text) :])
        return self._send(len(self._text))

    def _grow(self, piece: str) -> None:
        if not piece:
            return
        searched_from = max(0, len(self._text) - self._held_back)
        self._text += piece
        found = [self._text.find(stop, searched_from) for stop in self._stop]
        places = [place for place in found if place >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True

    def _send(self, end: int) -> str:
        piece = self._text[self._sent : max(end, self._sent)]
        self._sent += len(piece)
        return piece


def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
