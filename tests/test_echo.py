"""`echo`: the prompt before its completion, with the log-probabilities of its tokens."""

from __future__ import annotations

from typing import Any

import openai
import pytest

PROMPT = "the naïve fox 日本"


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "chat-a", "prompt": PROMPT, "temperature": 0, "max_tokens": 6, **options}
    )


def test_the_prompt_stands_before_each_answer(client: openai.OpenAI) -> None:
    plain = complete(client, n=2, temperature=1, seed=3)
    echoed = complete(client, n=2, temperature=1, seed=3, echo=True)
    assert [c.text for c in echoed.choices] == [PROMPT + c.text for c in plain.choices]
    assert echoed.usage == plain.usage
    assert echoed.choices[0].logprobs is None


def test_stops_are_looked_for_in_the_answer_only(client: openai.OpenAI) -> None:
    assert (
        complete(client, echo=True, stop="the").choices[0].text == PROMPT + complete(client, stop="the").choices[0].text
    )


@pytest.mark.parametrize("prompt", [PROMPT, [5, 6, 7, 8]])
def test_logprobs_of_prompt_and_answer(client: openai.OpenAI, prompt: Any) -> None:
    choice = complete(client, prompt=prompt, echo=True, logprobs=2).choices[0]
    told, own = choice.logprobs, complete(client, prompt=prompt, logprobs=2)
    n = own.usage.prompt_tokens
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert len(told.tokens) == n + own.usage.completion_tokens
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None), "nothing precedes the first"
    assert all(value < 0 for value in told.token_logprobs[1:])
    assert all(told.top_logprobs[1:])
    assert told.token_logprobs[n:] == pytest.approx(own.choices[0].logprobs.token_logprobs, abs=1e-4)
    length = len(choice.text) - len(own.choices[0].text)
    assert told.text_offset[n] == length
    assert told.text_offset == sorted(told.text_offset)
    for token, place in zip(told.tokens[:n], told.text_offset, strict=False):
        if "\ufffd" not in token:
            assert choice.text[place : place + len(token)] == token


def test_the_prompt_alone(client: openai.OpenAI) -> None:
    answer = complete(client, echo=True, logprobs=0, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (PROMPT, "length")
    assert answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        complete(client, echo=True, logprobs=2).choices[0].logprobs.token_logprobs[1 : answer.usage.prompt_tokens],
        abs=1e-4,
    )
    whole_context = complete(client, prompt=[5] * 256, echo=True, max_tokens=0)
    assert whole_context.usage.prompt_tokens == 256
    with pytest.raises(openai.BadRequestError, match="257 tokens"):
        complete(client, prompt=[5] * 257, echo=True, max_tokens=0)


@pytest.mark.parametrize("options", [{}, {"logprobs": 1}, {"max_tokens": 0, "logprobs": 1}])
def test_streamed_is_whole(client: openai.OpenAI, options: dict[str, Any]) -> None:
    request = {"prompt": [PROMPT, "a dog"], "n": 2, "temperature": 1, "seed": 9, "echo": True, **options}
    whole = complete(client, **request)
    texts, tokens, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in complete(client, **request, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    if options:
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]
        assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
