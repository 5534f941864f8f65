"""Grammar: which tokens may come next, so that a text is JSON of a schema, a match of a pattern, or one of some texts.

By the library llguidance; one state for each sequence. Knows nothing of logits, batches or HTTP.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from adapters.errors import shortened

WHITESPACE = r"[ \n\r\t]{0,20}"
"""Between JSON's tokens. Without a bound a model may write spaces for ever."""
STEP_FUEL = 20_000
"""The library's unit of work for one token of one sequence, at most; all others wait meanwhile: some 20 ms."""
SILENT = 0


class InvalidGrammar(ValueError):
    """A schema, pattern or choice that cannot be held to; the message may be shown to the caller."""


class GrammarFailed(Exception):
    """The library gave up on a grammar that it had accepted, since it is too costly to follow."""


class Grammar:
    """What one sequence may generate. The engine's thread only, once it is submitted."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits = allocate_token_bitmask(1, vocabulary)

    @property
    def failed(self) -> bool:
        """Whether it raised GrammarFailed. Any thread."""
        return bool(self._matcher.is_error())

    def copy(self) -> Grammar:
        """Another sequence's, in the same state."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary)

    def forbidden(self) -> NDArray[np.bool_]:
        """[vocabulary] the tokens that may not come next; an end token may where the text may end.

        Raises GrammarFailed.
        """
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        allowed = np.unpackbits(self._bits[0].view(np.uint8), count=self._vocabulary, bitorder="little")
        return np.equal(allowed, 0)

    def take(self, token_id: int) -> None:
        """The token that came. Raises GrammarFailed."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(f"the grammar cannot be followed: {shortened(self._matcher.get_error())}")


class Grammars:
    """Makes grammars for one tokenizer. Any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: frozenset[int]) -> None:
        """vocabulary: of the logits, which may be wider than the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None

    def of_schema(self, schema: Any) -> Grammar:
        """JSON that validates. Raises InvalidGrammar for what is no schema, and for what cannot be held to."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:  # nested too deep for the library
            raise InvalidGrammar(shortened(str(error))) from error
        return self._compile(grammar)

    def of_pattern(self, pattern: str) -> Grammar:
        """A text that the regular expression (Rust's) matches whole. Raises InvalidGrammar."""
        return self._compile(LLMatcher.grammar_from_regex(pattern))

    def of_choice(self, texts: Sequence[str]) -> Grammar:
        """One of the texts. Raises InvalidGrammar."""
        quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._compile(LLMatcher.grammar_from_lark(f"start: {quoted}"))

    def of_lark(self, rules: str, schemas: Mapping[str, Any]) -> Grammar:
        """A text of the grammar (in llguidance's Lark), where @name is JSON of schemas[name]. Raises InvalidGrammar."""
        named = [
            {"name": name, "json_schema": {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}}
            for name, schema in schemas.items()
        ]
        try:
            grammar = json.dumps({"grammars": [{"lark_grammar": rules}, *named]})
        except RecursionError as error:
            raise InvalidGrammar("a schema is nested too deep") from error
        return self._compile(grammar)

    def _compile(self, grammar: str) -> Grammar:
        tokenizer = self._wrapped()
        limits = LLParserLimits(step_lexer_fuel=STEP_FUEL, verbose_errors=False)
        broken, notes = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=limits)
        if broken or notes:
            raise InvalidGrammar(shortened("; ".join(notes)))
        made = Grammar(LLMatcher(tokenizer, grammar, log_level=SILENT, limits=limits), self._vocabulary)
        try:
            made.forbidden()  # the first step's work, much of what there is: here it holds up nobody
        except GrammarFailed as error:
            raise InvalidGrammar(str(error)) from error
        return made

    def _wrapped(self) -> LLTokenizer:
        """The library's form of the tokenizer, made when it is needed first."""
        if not self._eos_ids:
            raise InvalidGrammar("this base has no end token, so that a structured output could not end")
        with self._lock:
            if self._known is None:
                self._known = from_tokenizer(self._tokenizer, self._vocabulary, self._eos_ids)  # type: ignore[arg-type]
            return self._known
