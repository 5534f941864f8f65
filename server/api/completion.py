"""The shape of OpenAI's text completions: their choices and chunks, log-probabilities, and the prompt where echoed."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from server.api.generation import Choice
from server.api.schemas import CompletionRequest, Translation
from server.engine.request import SEQ_2_SEQ_LM, TokenLogprobs
from server.engine.tasks import Prompt
from server.generation import Delta
from server.service import Held, InvalidParameters


def completing(held: Held, body: CompletionRequest) -> tuple[Callable[[str], Prompt], Callable[[list[int]], Prompt]]:
    """What makes prompts of a request's texts, and of its token ids. Raises InvalidParameters."""
    tasks = held.language.tasks
    if held.task == SEQ_2_SEQ_LM:
        if body.echo:
            raise InvalidParameters(f"echo is for models that continue a prompt; {held.name!r} is {held.task}")
        task, languages = tasks.seq_2_seq_lm, (body.src_lang, body.tgt_lang)
        return lambda text: task.prepare(text, *languages), lambda ids: task.prepare_ids(ids, *languages)
    check_no_languages(held, body)
    return tasks.causal_lm.prepare_echo if body.echo else tasks.causal_lm.prepare, Prompt


def check_no_languages(held: Held, given: Translation) -> None:
    """Raises InvalidParameters."""
    if given.src_lang is not None or given.tgt_lang is not None:
        raise InvalidParameters(f"src_lang and tgt_lang are for SEQ_2_SEQ_LM; {held.name!r} is {held.task}")


class CompletionShape:
    """Of one request. A choice's text, and the places of its tokens in it, go on from chunk to chunk."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], body: CompletionRequest, prompts: Sequence[Prompt]
    ) -> None:
        self.object = self.chunk_object = "text_completion"
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._decode = decode
        self._body = body
        self._prompts = prompts
        self._lengths: dict[int, int] = {}
        """Choice -> characters of the tokens that were told."""

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return self._part(index, choice.text, choice.logprobs, choice.prompt_logprobs, choice.finish_reason)

    def opening(self, _index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = [delta.logprobs] if delta.logprobs else []
        return self._part(index, delta.text, logprobs, delta.prompt_logprobs, delta.finish_reason)

    def _part(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprobs],
        prompt_logprobs: Sequence[TokenLogprobs],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        told = _Told()
        if self._body.echo and index not in self._lengths:
            prompt = self._prompts[index // self._body.n]
            whole = prompt.text or self._decode(prompt.token_ids)
            text = whole + text
            self._lengths[index] = len(whole)
            self._tell_prompt(told, prompt, prompt_logprobs)
        for entry in logprobs:
            token = self._decode([entry.token_id])
            place = self._lengths.get(index, 0)
            told.add(token, place, entry.logprob, self._likeliest(entry))
            self._lengths[index] = place + len(token)
        shown = told.shown() if self._body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": finish_reason}

    def _tell_prompt(self, told: _Told, prompt: Prompt, entries: Sequence[TokenLogprobs]) -> None:
        """Its tokens, with their places in the text as it was given, else as they add up."""
        place = 0
        for number, token_id in enumerate(prompt.token_ids):
            token = self._decode([token_id])
            start = prompt.offsets[number][0] if prompt.offsets else place
            if 0 < number <= len(entries):
                entry = entries[number - 1]
                told.add(token, start, entry.logprob, self._likeliest(entry))
            else:
                told.add(token, start, None, None)
            place += len(token)

    def _likeliest(self, entry: TokenLogprobs) -> dict[str, float]:
        pairs = (*entry.top, (entry.token_id, entry.logprob))
        return {self._decode([token_id]): value for token_id, value in pairs}


class _Told:
    """Tokens as OpenAI lists them."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, float | None, dict[str, float] | None]] = []

    def add(self, token: str, place: int, logprob: float | None, top: dict[str, float] | None) -> None:
        """The first token of a prompt has no log-probability."""
        self._rows.append((token, place, logprob, top))

    def shown(self) -> dict[str, Any]:
        return {
            "tokens": [token for token, _, _, _ in self._rows],
            "token_logprobs": [logprob for _, _, logprob, _ in self._rows],
            "top_logprobs": [top for _, _, _, top in self._rows],
            "text_offset": [place for _, place, _, _ in self._rows],
        }
