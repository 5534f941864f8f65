"""The official OpenAI client against a server on a real socket."""

from __future__ import annotations

import base64
import json

import httpx
import numpy as np
import openai
import pytest

from tests.support import Live

HELLO = [{"role": "user", "content": "the quick brown fox"}]


def chat(client: openai.OpenAI, model: str, **options: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(  # type: ignore[call-overload]
        **{"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 12, **options}
    )


def test_models_are_listed_with_their_parent(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {"tiny", "chat-a", "chat-b", "sort", "tag", "embed"}
    assert models["tiny"]["parent"] is None
    assert models["chat-a"]["parent"] == "tiny"
    assert models["tiny"]["max_model_len"] == 256
    assert client.models.retrieve("sort").id == "sort"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


def test_chat_answers_differ_between_models_and_repeat(client: openai.OpenAI) -> None:
    answers = {model: chat(client, model) for model in ("tiny", "chat-a", "chat-b")}
    texts = [answer.choices[0].message.content for answer in answers.values()]
    assert len(set(texts)) == 3
    again = chat(client, "chat-a")
    assert again.choices[0].message.content == texts[1]
    assert again.usage is not None
    assert again.usage.total_tokens == again.usage.prompt_tokens + again.usage.completion_tokens
    assert again.choices[0].finish_reason in ("stop", "length")


def test_streamed_chat_is_the_whole_chat(client: openai.OpenAI) -> None:
    whole = chat(client, "chat-b", n=2, temperature=1, seed=5)
    stream = client.chat.completions.create(
        model="chat-b", messages=HELLO, temperature=1, seed=5, max_tokens=12, n=2, stream=True,
        stream_options={"include_usage": True},
    )  # type: ignore[call-overload]  # fmt: skip
    texts, reasons, usage = ["", ""], ["", ""], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert texts[0] != texts[1], "each choice has a seed of its own"


def test_stream_ends_in_done(live: Live) -> None:
    body = {"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 3}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, "chat-a", logprobs=True, top_logprobs=3, max_tokens=4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for entry in logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0], "a greedy token is the likeliest"


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["the quick", "lazy dog", "over the"]
    together = client.completions.create(model="chat-a", prompt=prompts, temperature=0, max_tokens=8)
    for prompt, choice in zip(prompts, together.choices, strict=True):
        alone = client.completions.create(model="chat-a", prompt=prompt, temperature=0, max_tokens=8)
        assert alone.choices[0].text == choice.text
    ids = client.completions.create(model="chat-a", prompt=[5, 6, 7], temperature=0, max_tokens=2)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="fox", temperature=0, max_tokens=5, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    n = answer.usage.completion_tokens  # type: ignore[union-attr]
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == len(logprobs.text_offset or []) == n
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs or [])


def test_stop_strings_never_leak(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="chat-b", prompt="fox", temperature=0, max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    cut = client.completions.create(model="chat-b", prompt="fox", temperature=0, max_tokens=24, stop=[stop, "@@@@"])
    assert cut.choices[0].text == expected
    assert cut.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model="chat-b", prompt="fox", temperature=0, max_tokens=24, stop=[stop, "@@@@"], stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == expected


def test_vllm_sampling_fields_are_served(client: openai.OpenAI) -> None:
    extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "min_tokens": 6}
    answer = chat(client, "chat-a", temperature=1, max_tokens=6, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    greedy = chat(client, "chat-a", max_tokens=6, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.content == greedy.choices[0].message.content, "top_k 1 is greedy"


def test_a_conversation_goes_on_with_the_clients_own_message(client: openai.OpenAI) -> None:
    answer = chat(client, "chat-a").choices[0].message
    messages = [*HELLO, answer, {"role": "user", "content": "the dog", "name": "ann"}]
    assert chat(client, "chat-a", messages=messages).choices[0].finish_reason in ("stop", "length")


def test_null_is_not_given(client: openai.OpenAI) -> None:
    nulls = dict.fromkeys(
        ["top_p", "n", "stream", "logprobs", "presence_penalty", "frequency_penalty", "tools", "logit_bias",
         "response_format", "stop", "user", "seed"]
    )  # fmt: skip
    assert chat(client, "chat-a", **nulls).choices == chat(client, "chat-a").choices


def test_the_sampled_token_is_among_the_top_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="fox", temperature=2, seed=4, max_tokens=9, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    for token, value, top in zip(
        logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True
    ):
        assert top == {token: value}


def test_embeddings_in_both_encodings(client: openai.OpenAI, live: Live) -> None:
    answer = client.embeddings.create(model="embed", input=["the quick brown fox", "lazy dog"])
    vectors = np.array([item.embedding for item in answer.data])  # the client asks for base64
    assert vectors.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    plain = client.embeddings.create(model="embed", input="lazy dog", encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, vectors[1], atol=1e-5)
    body = {"model": "embed", "input": "lazy dog", "encoding_format": "base64"}
    raw = httpx.post(f"{live.url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), vectors[1], atol=1e-5)
    base = client.embeddings.create(model="tiny", input="lazy dog").data[0].embedding
    assert np.abs(np.array(base) - vectors[1]).max() > 1e-3


@pytest.mark.parametrize("route", ["/classify", "/v1/classify"])
def test_classify_answers_as_vllm(live: Live, route: str) -> None:
    answer = httpx.post(live.url + route, json={"model": "sort", "input": ["the fox", "the dog"]})
    data = answer.json()["data"]
    assert [item["index"] for item in data] == [0, 1]
    for item in data:
        assert item["num_classes"] == 3
        assert sum(item["probs"]) == pytest.approx(1)
        assert item["label"] == f"LABEL_{int(np.argmax(item['probs']))}"
    assert answer.headers["x-adapter"] == "sort"
    assert len(answer.headers["x-adapter-digest"]) == 64


def test_a_bias_makes_a_token_certain_or_impossible(client: openai.OpenAI) -> None:
    free = client.completions.create(model="chat-a", prompt=[5, 6], max_tokens=4, temperature=0, logprobs=0)
    assert free.choices[0].logprobs is not None
    bias = {"100": 100}
    forced = client.completions.create(
        model="chat-a", prompt=[5, 6], max_tokens=4, temperature=0, logit_bias=bias, extra_body={"ignore_eos": True}
    )
    letter = httpx.post(f"{str(client.base_url).removesuffix('/v1/')}/detokenize", json={"tokens": [100] * 4})
    assert forced.choices[0].text == letter.json()["prompt"] != free.choices[0].text


def test_tokens_are_counted_and_told_as_text(live: Live) -> None:
    text = "the quick brown fox, é 🦊"
    counted = httpx.post(f"{live.url}/tokenize", json={"model": "chat-a", "prompt": text, "return_token_strs": True})
    answer = counted.json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 0
    assert answer["max_model_len"] == 256
    assert httpx.post(f"{live.url}/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    plain = httpx.post(f"{live.url}/tokenize", json={"prompt": text}).json()
    assert plain == {**answer, "token_strs": None}
    assert httpx.post(f"{live.url}/tokenize", json={"prompt": ""}).json()["count"] == 0
    assert httpx.post(f"{live.url}/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_is_counted_as_the_chat_route_counts_it(client: openai.OpenAI, live: Live) -> None:
    usage = chat(client, "chat-a", max_tokens=1).usage
    assert usage is not None
    counts = [
        httpx.post(f"{live.url}/tokenize", json={"messages": HELLO, "add_generation_prompt": answer}).json()["count"]
        for answer in (True, False)
    ]
    assert counts[0] == usage.prompt_tokens
    assert counts[1] < counts[0]
