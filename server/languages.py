"""Language: how the texts of one model become token ids and back; the base's, or that of an adapter's own tokenizer.

Event loop only, but for what says otherwise.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from adapters.errors import InvalidAdapter
from adapters.tokenizer_files import read_tokenizer_files, tokenizer_digest
from adapters.version import AdapterVersion
from server.engine.chat import Render
from server.engine.grammar import Grammars, InvalidGrammar
from server.engine.tasks import InvalidPrompt, Tasks, token_ids
from server.generation import AdapterLost
from server.own_tokenizers import ExaminedTokenizers


@dataclass(frozen=True)
class Language:
    """One tokenizer on a vocabulary. Any thread."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    """Of the logits, which may be wider than the tokenizer's."""
    eos_ids: frozenset[int]
    input_size: int
    """Of the vocabulary that it reads."""
    start_ids: tuple[int, ...] = ()
    """What targets begin with, on an encoder-decoder."""
    render: Render | None = None
    """What renders the chat template, where that is an adapter's."""

    @cached_property
    def tasks(self) -> Tasks:
        return Tasks(self.tokenizer, self.start_ids, self.render)

    @cached_property
    def grammars(self) -> Grammars:
        """What makes the grammars that outputs are held to. Raises InvalidGrammar."""
        if not self.tokenizer.is_fast:
            raise InvalidGrammar("this base's tokenizer is one in Python: its output cannot be held to a form")
        return Grammars(self.tokenizer, self.vocabulary_size, self.eos_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, special tokens among it."""
        text = self.tokenizer.decode(list(token_ids))
        assert isinstance(text, str)
        return text

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Its token ids. Raises InvalidPrompt."""
        if self.start_ids:  # such a tokenizer may stand on another request's language
            return self.tasks.seq_2_seq_lm.encode(text, add_special_tokens=add_special_tokens)
        return token_ids(self.tokenizer, text, add_special_tokens)

    def check_token_ids(self, ids: Sequence[int]) -> None:
        """Raises InvalidPrompt."""
        if ids and max(ids) >= self.input_size:
            raise InvalidPrompt(f"token id {max(ids)} is outside the vocabulary of {self.input_size}")


class Languages:
    """The base's, and those of adapters that were used last."""

    def __init__(self, base: Language, limit: int) -> None:
        self.base = base
        self._limit = limit
        self._loader = ExaminedTokenizers(base.tokenizer)
        self._known: OrderedDict[tuple[str, int], Language] = OrderedDict()
        self._loading = asyncio.Lock()

    async def of(self, version: AdapterVersion | None) -> Language:
        """That of a version, or of the base. Raises AdapterLost where its files are not there any more."""
        if version is None or not (version.info.tokenizer or version.info.vocabulary_size):
            return self.base
        key = (version.info.tokenizer, version.info.vocabulary_size)
        if key not in self._known:
            async with self._loading:
                if key not in self._known:
                    self._known[key] = await asyncio.to_thread(self._load, version)
        self._known.move_to_end(key)
        language = self._known[key]
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return language

    def _load(self, version: AdapterVersion) -> Language:
        """Any thread."""
        base, size = self.base, version.info.vocabulary_size
        sized = replace(base, vocabulary_size=size or base.vocabulary_size, input_size=size or base.input_size)
        if not version.info.tokenizer:
            return sized
        try:
            files = {} if version.source is None else read_tokenizer_files(version.source.path)
        except InvalidAdapter as error:
            raise AdapterLost(f"the adapter's tokenizer could not be loaded: {error}") from error
        if tokenizer_digest(files) != version.info.tokenizer:
            raise AdapterLost("the adapter's tokenizer could not be loaded: its files changed or are gone")
        tokenizer = self._loader.load(files)
        own = tokenizer.chat_template != base.tokenizer.chat_template
        render = self._loader.templates.render if own else None
        return replace(sized, tokenizer=tokenizer, eos_ids=self._ends(tokenizer), render=render)

    def _ends(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """The tokenizer's own end token, and those of the base that are still the same tokens."""
        ours, theirs = self.base.tokenizer, tokenizer
        kept = {i for i in self.base.eos_ids if theirs.convert_ids_to_tokens(i) == ours.convert_ids_to_tokens(i)}
        own = theirs.eos_token_id
        return frozenset(kept | ({own} if isinstance(own, int) else set()))
