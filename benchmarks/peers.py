"""Generation through HTTP against `peft`'s mixed batch: the same requests on the same base and adapters, in one run.

    python -m benchmarks.peers                          # 1, 8 and 32 adapters, about ten minutes
    python -m benchmarks.peers --adapters 8 --rounds 1

64 requests with prompts of about 127 tokens, each answered with exactly 64 new tokens, greedy, 32 at a time. Ours:
`multilora serve` in a process of its own on 127.0.0.1, exact in fp32, asked through /v1/completions. peft: in this
process, without HTTP, one static left-padded batch of 32 at a time with `adapter_names`. They run in turns, and never
at the same time. Adapters are random, rank 16 on all seven linears of SmolLM2-135M, saved in fp16.

Prints the ratio of output tokens a second, with its target, and how many answers have the same text.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM

from adapters.layout import layout_of
from benchmarks.common import (
    Served,
    Tokens,
    Verdicts,
    arguments,
    around,
    cut_prompts,
    introduce,
    ratio,
    save_adapter,
    served,
    with_adapters,
)
from server.bases import load_tokenizer, resolve_base
from server.engine.request import CAUSAL_LM

BASE = "smollm2"
AT_ONCE = 32
TARGETS = {1: 2.2, 8: 3.0, 32: 5.0}
"""Distinct adapters -> how many times peft's output tokens a second."""


def peft_model(location: str, folder: Path, count: int, dtype: torch.dtype) -> Any:
    """The base with adapters a0, a1, …, which are saved into `folder` too."""
    model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    layout = layout_of(model.base_model, model.base_model_prefix, model.config.hidden_size, True)
    for i in range(count):
        save_adapter(layout, folder / f"a{i}", i, CAUSAL_LM, dtype)
    return with_adapters(model, folder, count)


@torch.inference_mode()
def run_peft(model: Any, requests: Tokens, names: list[str], new_tokens: int, pad: int) -> Tokens:
    answers: Tokens = []
    for start in range(0, len(requests), AT_ONCE):
        batch = requests[start : start + AT_ONCE]
        width = max(map(len, batch))
        output = model.generate(
            input_ids=torch.tensor([[pad] * (width - len(r)) + r for r in batch]),
            attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in batch]),
            adapter_names=names[start : start + AT_ONCE],
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=pad,
        )
        answers += [row[width:].tolist() for row in output]
    return answers


def run_server(server: Served, requests: Tokens, names: list[str], new_tokens: int) -> list[str]:
    """The texts of all answers; AT_ONCE requests are in flight, as many clients would send them."""

    async def ask_all() -> list[str]:
        room = asyncio.Semaphore(AT_ONCE)
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

            async def ask(ids: list[int], name: str) -> str:
                body = {
                    "model": name,
                    "prompt": ids,
                    "max_tokens": new_tokens,
                    "min_tokens": new_tokens,
                    "temperature": 0,
                }
                async with room:
                    answer = await client.post("/v1/completions", json=body)
                content = answer.raise_for_status().json()
                assert content["usage"]["completion_tokens"] == new_tokens
                return str(content["choices"][0]["text"])

            return await asyncio.gather(*map(ask, requests, names))

    return asyncio.run(ask_all())


def compare(count: int, options: argparse.Namespace, verdicts: Verdicts) -> None:
    location = resolve_base(BASE).location
    tokenizer = load_tokenizer(location)
    requests = cut_prompts(location, around(options.prompt_tokens, options.requests))
    names = [f"a{i % count}" for i in range(options.requests)]
    pad: Any = tokenizer.pad_token_id
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        peft = peft_model(location, Path(folder), count, getattr(torch, options.dtype))
        with served(Path(folder), "--max-loras", str(count), "--max-num-seqs", str(AT_ONCE)) as server:
            run_server(server, requests[: AT_ONCE // 2], names, 4)
            run_peft(peft, requests[:2], names[:2], 2, pad)
            for turn in range(options.rounds):
                started = time.perf_counter()
                texts = run_server(server, requests, names, options.new_tokens)
                ours.append(time.perf_counter() - started)
                started = time.perf_counter()
                answers = run_peft(peft, requests, names, options.new_tokens, pad)
                theirs.append(time.perf_counter() - started)
                print(f"    turn {turn + 1}: server {ours[-1]:.1f} s, peft {theirs[-1]:.1f} s", flush=True)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    same = sum(a == b for a, b in zip(texts, expected, strict=True))
    tokens = options.requests * options.new_tokens
    note = f"{tokens / min(ours):.0f} against {tokens / min(theirs):.0f} tokens/s; same text in {same} of {len(texts)}"
    value = ratio(theirs, ours)
    if count in TARGETS:
        verdicts.at_least(f"{count} adapters: tokens/s over peft", value, TARGETS[count], note)
    else:
        verdicts.told(f"{count} adapters: tokens/s over peft", value, note)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=None, help="distinct adapters (quick: 8 only)")
    parser.add_argument("--requests", type=int, default=0, help="default 64, quick 32")
    parser.add_argument("--prompt-tokens", type=int, default=127)
    parser.add_argument("--new-tokens", type=int, default=0, help="default 64, quick 24")
    parser.add_argument("--rounds", type=int, default=0, help="default 2, quick 1")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="adapters as saved")
    options = parser.parse_args()
    quick = options.quick
    options.requests = options.requests or (32 if quick else 64)
    options.new_tokens = options.new_tokens or (24 if quick else 64)
    options.rounds = options.rounds or (1 if quick else 2)
    introduce(f"{options.requests} requests through HTTP against peft, {options.dtype} adapters, in turns")
    verdicts = Verdicts()
    for count in options.adapters or ((8,) if quick else tuple(TARGETS)):
        compare(count, options, verdicts)
    verdicts.summary()


if __name__ == "__main__":
    main()
