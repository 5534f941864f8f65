"""An adapter's own tokenizer, from the files beside its checkpoint: loaded, examined, compared with the base's.

transformers' own code makes it of the files alone: no code that they name is ever run. Any thread.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adapters.errors import InvalidAdapter
from adapters.tokenizer_files import TEMPLATE_FILE, TOKENIZER_FILE, tokenizer_digest
from server.engine.chat import ChatTemplate
from server.engine.panics import panics_as
from server.templates import TemplateLimit, TemplateProcess

MAX_JUDGED = 1024


class Judgement(NamedTuple):
    """What is known of one tokenizer that can be served."""

    is_the_bases: bool
    largest_id: int


class ExaminedTokenizers:
    """Judges the tokenizers of checkpoints for one base."""

    def __init__(self, base: PreTrainedTokenizerBase) -> None:
        self.base = base
        self.templates = TemplateProcess()
        self._judged: dict[str, Judgement] = {}
        """By the files' digest: many adapters have the same."""

    def load(self, files: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
        """Of its files, by name; with a chat template alone it is the base's with that. Raises InvalidAdapter."""
        if TOKENIZER_FILE in files:
            tokenizer = _load(files)
        else:
            tokenizer = copy.deepcopy(self.base)
            tokenizer.chat_template = _template(files)
        return tokenizer

    def __call__(self, files: Mapping[str, bytes], vocabulary_size: int, resized: bool) -> bool:
        """Whether it is another than the base's; no files: it has none of its own. Raises InvalidAdapter.

        vocabulary_size: how many tokens the adapter knows; 0: no other tokenizer can be served.
        resized: whether that is another number than the base's, so that not even the base's tokenizer need fit.
        """
        judgement = self._judge(files)
        largest, own = judgement.largest_id, TOKENIZER_FILE in files and not judgement.is_the_bases
        if (own or resized) and largest >= vocabulary_size:
            known = f"{vocabulary_size} tokens" if vocabulary_size else "no tokens that an adapter may choose"
            whose = "its tokenizer" if own else "the base's tokenizer, which it is served with,"
            raise InvalidAdapter([f"{whose} has token {largest}, its embedding {known}"])
        return not judgement.is_the_bases

    def _judge(self, files: Mapping[str, bytes]) -> Judgement:
        key = tokenizer_digest(files)
        known = self._judged.get(key)
        if known is None:
            tokenizer = self.load(files) if files else self.base
            if files:
                self._check_template(tokenizer)
            largest = max(tokenizer.get_vocab().values(), default=0)
            known = Judgement(_identity(tokenizer) == _identity(self.base), largest)
            if len(self._judged) >= MAX_JUDGED:
                self._judged.clear()
            self._judged[key] = known
        return known

    def _check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Its syntax, and what a message costs; a template may refuse a conversation for reasons of its own."""
        if not tokenizer.chat_template or tokenizer.chat_template == self.base.chat_template:
            return
        try:
            ChatTemplate(tokenizer, self.templates.render).prompt([{"role": "user", "content": "a"}], answer=False)
        except (TemplateSyntaxError, TemplateLimit) as error:
            raise InvalidAdapter([f"its chat template cannot be served: {error}"]) from error
        except (TemplateError, ValueError):
            return


def _load(files: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            with panics_as(ValueError("its parts do not fit together")):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True
                )
                tokenizer("a")
        except Exception as error:  # what others wrote may make transformers raise anything
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0].replace(folder, "the checkpoint")
            raise InvalidAdapter([f"its tokenizer cannot be loaded: {reason}"]) from error
    if not tokenizer.is_fast:
        raise InvalidAdapter(["its tokenizer has no fast (tokenizers) form"])
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _template(files: Mapping[str, bytes]) -> str:
    try:
        return files[TEMPLATE_FILE].decode()
    except UnicodeDecodeError as error:
        raise InvalidAdapter([f"{TEMPLATE_FILE} is not UTF-8"]) from error


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What requests see of a tokenizer."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    return (
        backend, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id,
    )  # fmt: skip
