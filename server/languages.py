"""Language: how the texts of one model become token ids and back; the base's, or that of an adapter's own tokenizer.

Event loop only, but for what says otherwise.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from adapters.errors import InvalidAdapter
from adapters.tokenizer_files import read_tokenizer_files, tokenizer_digest
from adapters.version import AdapterVersion
from server.engine.grammar import Grammars
from server.engine.tasks import InvalidPrompt, Tasks
from server.generation import AdapterLost
from server.own_tokenizers import ExaminedTokenizers


@dataclass(frozen=True)
class Language:
    """One tokenizer on a vocabulary. Any thread."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    """Of the logits, which may be wider than the tokenizer's."""
    eos_ids: frozenset[int]

    @cached_property
    def tasks(self) -> Tasks:
        return Tasks(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """What makes the grammars that outputs are held to."""
        return Grammars(self.tokenizer, self.vocabulary_size, self.eos_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, special tokens among it."""
        text = self.tokenizer.decode(list(token_ids))
        assert isinstance(text, str)
        return text

    def check_token_ids(self, ids: Sequence[int]) -> None:
        """Raises InvalidPrompt."""
        if ids and max(ids) >= self.vocabulary_size:
            raise InvalidPrompt(f"token id {max(ids)} is outside the vocabulary of {self.vocabulary_size}")


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
        size = version.info.vocabulary_size or self.base.vocabulary_size
        if not version.info.tokenizer:
            return Language(self.base.tokenizer, size, self.base.eos_ids)
        try:
            files = {} if version.source is None else read_tokenizer_files(version.source.path)
        except InvalidAdapter as error:
            raise AdapterLost(f"the adapter's tokenizer could not be loaded: {error}") from error
        if tokenizer_digest(files) != version.info.tokenizer:
            raise AdapterLost("the adapter's tokenizer could not be loaded: its files changed or are gone")
        tokenizer = self._loader.load(files)
        return Language(tokenizer, size, self._ends(tokenizer))

    def _ends(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """The tokenizer's own end token, and those of the base that are still the same tokens."""
        ours, theirs = self.base.tokenizer, tokenizer
        kept = {i for i in self.base.eos_ids if theirs.convert_ids_to_tokens(i) == ours.convert_ids_to_tokens(i)}
        own = theirs.eos_token_id
        return frozenset(kept | ({own} if isinstance(own, int) else set()))
