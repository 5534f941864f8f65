"""CAUSAL_LM: a `prompt` and its `completion`, or chat `messages`. The loss is on what the model writes, alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from server.engine.tasks import CausalLM, InvalidPrompt
from server.training.data import InvalidData, InvalidRow, Row, convert_rows, read_rows
from server.training.examples import IGNORED, Evaluation, Example, by_length, pad_rows, padded

GENERATED = ("chrf", "bleu")
"""Metrics that need whole answers."""


class TextGeneration:
    """Causal language modelling. A prompt's token ids are those that the server makes of it.

    A conversation gives one example for each message of the assistant: what stands before it is the prompt.
    """

    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    metrics: tuple[str, ...] = ("loss", "perplexity", "chrf", "bleu")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool, eval_samples: int, max_new_tokens: int) -> None:
        """chat: a prompt is a user's message, where there is a chat template."""
        if tokenizer.eos_token_id is None:
            raise InvalidData("the base's tokenizer has no token that ends an answer")
        self.tokenizer = tokenizer
        self.eval_samples = eval_samples
        self.max_new_tokens = max_new_tokens
        self._task = CausalLM(tokenizer)
        self._chat = chat and self._task.chats

    def read(self, path: Path) -> list[Example]:
        rows = read_rows(path)
        found = convert_rows(path, rows, lambda row: [*self._examples(row)])
        return [example for examples in found for example in examples]

    def _examples(self, row: Row) -> Iterator[Example]:
        if row.has("tools"):
            raise InvalidRow("tools are not learnt: the column is for nothing")
        if row.has("messages") and (row.has("prompt") or row.has("completion")):
            raise InvalidRow("there are messages and a prompt or completion: which of them?")
        try:
            if row.has("messages"):
                yield from self._of_messages(row.listed("messages"))
            else:
                yield self._of_pair(row.text("prompt"), row.text("completion"))
        except InvalidPrompt as error:
            raise InvalidRow(str(error)) from error

    def _of_pair(self, prompt: str, completion: str) -> Example:
        prepare = self._task.prepare_input if self._chat else self._task.prepare
        return self._example(prompt, prepare(prompt).token_ids, completion, prompt)

    def _of_messages(self, messages: list[Any]) -> Iterator[Example]:
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRow(f"a message needs a role, not {message!r}")
            if message.keys() - {"role", "content"}:
                raise InvalidRow(f"of a message role and content are learnt, not {', '.join(message)}")
            if not isinstance(message.get("content"), str):
                raise InvalidRow(f"a message needs content that is a text, not {message.get('content')!r}")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
        if not answers:
            raise InvalidRow("no message of the assistant follows another")
        opening = "\n".join(message["content"] for message in messages[: answers[0]])
        for i in answers:
            before = "\n".join(message["content"] for message in messages[:i])
            prompt = self._task.prepare_chat(messages[:i]).token_ids
            yield self._example(before, prompt, messages[i]["content"], opening)

    def _example(self, text: str, prompt: list[int], answer: str, source: str) -> Example:
        """target: the ids themselves, with the prompt's ignored."""
        ids = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return Example(text, (*prompt, *ids), (*([IGNORED] * len(prompt)), *ids), answer, source)

    def load(self, location: str, dtype: torch.dtype) -> Any:
        """Of the base's settings for generation the ends of an answer alone are kept: penalties are the caller's."""
        model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
        ends = model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)  # type: ignore[no-untyped-call]
        return model

    def count(self, batch: Sequence[Example]) -> int:
        return sum(target != IGNORED for example in batch for target in example.target)

    def loss(self, model: Any, batch: Sequence[Example]) -> Tensor:
        """Logits are computed where a row has a target alone: in fp32 they are most of what a step needs of memory."""
        inputs = padded((example.input_ids for example in batch), self.tokenizer.pad_token_id, model.device)
        targets = pad_rows([example.target for example in batch], IGNORED).to(model.device)[:, 1:]
        (places,) = (targets != IGNORED).any(0).nonzero(as_tuple=True)
        logits = model(**inputs, use_cache=False, logits_to_keep=places).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets[:, places].flatten(), ignore_index=IGNORED)

    def evaluate(self, model: Any, examples: Sequence[Example], size: int, generate: bool) -> Evaluation:
        """The loss over all; chrF and BLEU, and predictions, of the first `eval_samples`, decoded greedily."""
        total, count = 0.0, 0
        for indices in by_length(examples, size):
            batch = [examples[i] for i in indices]
            total, count = total + float(self.loss(model, batch)) * self.count(batch), count + self.count(batch)
        metrics = {"loss": total / count, "perplexity": math.exp(min(total / count, 80.0))}
        if not generate:
            return Evaluation(metrics, [])
        chosen = examples[: self.eval_samples]
        answers = self.answers(model, chosen, size)
        references = [[example.expected for example in chosen]]
        metrics["chrf"] = float(CHRF().corpus_score(answers, references).score)
        metrics["bleu"] = float(BLEU().corpus_score(answers, references).score)
        return Evaluation(metrics, [{"predicted": answer} for answer in answers])

    def answers(self, model: Any, examples: Sequence[Example], size: int) -> list[str]:
        """What the model says to each prompt, the likeliest token each time."""
        results = [""] * len(examples)
        pad = self.tokenizer.pad_token_id
        for indices in by_length(examples, size):
            prompts = [_prompt(examples[i]) for i in indices]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            written = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                max_new_tokens=self._room(model, width), pad_token_id=pad,
            )  # fmt: skip
            for i, row in zip(indices, written[:, width:].tolist(), strict=True):
                results[i] = str(self.tokenizer.decode(row, skip_special_tokens=True))
        return results

    def _room(self, model: Any, width: int) -> int:
        """Tokens of an answer, as far as the base has positions."""
        longest: int = getattr(model.config, "max_position_embeddings", width + self.max_new_tokens)
        return max(1, min(self.max_new_tokens, longest - width))


def _prompt(example: Example) -> list[int]:
    return [i for i, target in zip(example.input_ids, example.target, strict=True) if target == IGNORED]
