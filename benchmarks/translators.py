"""An encoder-decoder's output tokens a second against `peft`'s mixed batch, and against the base alone; in one run.

    python -m benchmarks.translators                    # about five minutes
    python -m benchmarks.translators --sizes t5-small --adapters 32

No trained encoder-decoder comes in a package, so that the weights are random; their shapes are those of OPUS-MT's
Marian models (74 million parameters) and of T5-small (60). Adapters of rank 16 on all linears, saved in fp16. 64
sources of log-normal length, 30 tokens on average, each answered with exactly 32 new tokens, greedy, 32 at a time.
Ours: all requests queued, Engine.step until none is left. peft: right-padded batches of 32 with `adapter_names`, in
order of arrival. Base alone: the same requests without adapters in the same engine. In turns; tokens are compared, too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, MarianConfig, PretrainedConfig, T5Config

from adapters.checkpoint import read_checkpoint
from benchmarks.common import (
    Tokens,
    Verdicts,
    arguments,
    in_turns,
    introduce,
    ratio,
    save_adapter,
    seconds,
    with_adapters,
)
from server.config import ServerConfig
from server.engine.base_model import body_layout, load_base
from server.engine.engine import Engine
from server.engine.request import SEQ_2_SEQ_LM, SamplingParams, Sequence

AT_ONCE = 32
MEAN_TOKENS, SIGMA, LONGEST = 30, 0.6, 128
TARGETS = {8: 2.0}
"""Distinct adapters -> how many times peft's output tokens a second."""


def marian() -> PretrainedConfig:
    return MarianConfig(
        vocab_size=58101, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512,
        pad_token_id=58100, eos_token_id=0, decoder_start_token_id=58100, forced_eos_token_id=None,
        activation_function="swish", scale_embedding=True,
    )  # fmt: skip


def t5_small() -> PretrainedConfig:
    sizes: dict[str, Any] = {
        "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    return T5Config(**sizes)


SIZES = {"marian": marian, "t5-small": t5_small}


def sources(count: int, vocabulary: int) -> Tokens:
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, count)
    lengths = np.clip(drawn, 3, LONGEST).astype(int)
    return [rng.integers(5, vocabulary - 5, n).tolist() for n in lengths]


def run_engine(engine: Engine, requests: Tokens, names: list[str | None], new_tokens: int) -> Tokens:
    stacks = engine.base.stacks
    assert stacks is not None
    params = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0)
    sequences = []
    for i, (ids, name) in enumerate(zip(requests, names, strict=True)):
        version = engine.registry.acquire(name) if name else None
        sequences.append(
            Sequence(
                i,
                SEQ_2_SEQ_LM,
                list(stacks.start_ids),
                version,
                params,
                engine.base.eos_ids,
                source_ids=ids,
                forbidden=stacks.forbidden,
            )
        )
        engine.add(sequences[-1])
    while engine.scheduler.unfinished():
        engine.step()
    return [sequence.output_ids for sequence in sequences]


@torch.inference_mode()
def run_peft(model: Any, requests: Tokens, names: list[str], new_tokens: int, pad: int) -> Tokens:
    answers: Tokens = []
    for start in range(0, len(requests), AT_ONCE):
        batch = requests[start : start + AT_ONCE]
        width = max(map(len, batch))
        output = model.generate(
            input_ids=torch.tensor([r + [pad] * (width - len(r)) for r in batch]),
            attention_mask=torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in batch]),
            adapter_names=names[start : start + AT_ONCE],
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        answers += [row[1:].tolist() for row in output]
    return answers


def compare(size: str, count: int, options: argparse.Namespace, verdicts: Verdicts) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        torch.manual_seed(0)
        model: Any = AutoModelForSeq2SeqLM.from_config(SIZES[size]())
        model.save_pretrained(where / "base")
        layout, pad = body_layout(model), model.config.pad_token_id
        for i in range(count):
            save_adapter(layout, where / f"a{i}", i, SEQ_2_SEQ_LM)
        settings = ServerConfig(max_loras=count, max_cpu_loras=count, max_num_seqs=AT_ONCE)
        engine = Engine(settings, load_base(str(where / "base")), size)
        for i in range(count):
            engine.registry.put(f"a{i}", read_checkpoint(where / f"a{i}", engine.base.layout, engine.limits))
        peft = with_adapters(model, where, count)
    requests = sources(options.requests, engine.base.vocabulary_size)
    names = [f"a{i % count}" for i in range(len(requests))]
    answers: dict[str, Tokens] = {}

    def ours() -> None:
        answers["ours"] = run_engine(engine, requests, [*names], options.new_tokens)

    def theirs() -> None:
        answers["peft"] = run_peft(peft, requests, names, options.new_tokens, pad)

    times = in_turns(
        {
            "ours": lambda: seconds(ours),
            "peft": lambda: seconds(theirs),
            "base": lambda: seconds(lambda: run_engine(engine, requests, [None] * len(requests), options.new_tokens)),
        },
        options.rounds,
    )
    same = sum(a == b for a, b in zip(answers["ours"], answers["peft"], strict=True))
    tokens = len(requests) * options.new_tokens
    note = (
        f"{tokens / min(times['ours']):.0f} against {tokens / min(times['peft']):.0f} tokens/s; "
        f"same tokens in {same} of {len(requests)}"
    )
    what, value = f"{size}, {count} adapters: tokens/s over peft", ratio(times["peft"], times["ours"])
    if count in TARGETS:
        verdicts.at_least(what, value, TARGETS[count], note)
    else:
        verdicts.told(what, value, note)
    verdicts.told(f"{size}, {count} adapters: over the base alone", ratio(times["base"], times["ours"]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=None, help="default both, quick marian")
    parser.add_argument("--adapters", type=int, nargs="+", default=None, help="distinct ones (default 1 8 32, quick 8)")
    parser.add_argument("--requests", type=int, default=0, help="default 64, quick 32")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=0, help="default 3, quick 1")
    options = parser.parse_args()
    quick = options.quick
    options.requests = options.requests or (32 if quick else 64)
    options.rounds = options.rounds or (1 if quick else 3)
    introduce(f"{options.requests} sources against peft, fp16 adapters, in turns")
    verdicts = Verdicts()
    for size in options.sizes or (("marian",) if quick else tuple(SIZES)):
        for count in options.adapters or ((8,) if quick else (1, 8, 32)):
            compare(size, count, options, verdicts)
    verdicts.summary()


if __name__ == "__main__":
    main()
