"""Generation throughput: our engine against `peft`'s mixed batch, the same requests, in one run.

    python benchmarks/throughput.py                    # 32 requests over 8 adapters
    python benchmarks/throughput.py --adapters 1 8 32

Both run the same base in fp32 in this process, in turns; greedy, each answer exactly --new-tokens long. PEFT gets
one left-padded batch with `adapter_names`. Prints output tokens a second of each, their ratio, and how many answers
have the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters.adapter import Limits
from adapters.checkpoint import read_checkpoint
from server.bases import load_tokenizer, resolve_base
from server.config import ServerConfig
from server.engine.base_model import load_base
from server.engine.engine import Engine
from server.engine.request import CAUSAL_LM, SamplingParams, Sequence

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = (Path(__file__).parent / "prompts.txt").read_text()
Tokens = list[list[int]]


def prompts(location: str, count: int, length: int) -> Tokens:
    """`count` different prompts of `length` tokens, a quarter more or less."""
    ids = load_tokenizer(location)(TEXT)["input_ids"]
    lengths = [length * 3 // 4 + i * length // (2 * max(count - 1, 1)) for i in range(count)]
    assert len(ids) > length * 2
    starts = [i * (len(ids) - max(lengths)) // count for i in range(count)]
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def peft_model(location: str, count: int, rank: int) -> Any:
    """The base with `count` random, visible adapters a0, a1, …"""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    config = LoraConfig(
        task_type=CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False
    )
    model = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.2)
    return model.eval()


@torch.inference_mode()
def run_peft(model: Any, requests: Tokens, names: list[str], new_tokens: int, pad: int) -> Tokens:
    width = max(map(len, requests))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in requests])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in requests])
    output = model.generate(
        input_ids=ids, attention_mask=mask, adapter_names=names, do_sample=False, max_new_tokens=new_tokens,
        min_new_tokens=new_tokens, pad_token_id=pad,
    )  # fmt: skip
    return [row[width:].tolist() for row in output]


def make_engine(location: str, folder: Path, count: int, rows: int) -> Engine:
    base = load_base(location)
    engine = Engine(ServerConfig(max_loras=count, max_num_seqs=rows), base, "base")
    for i in range(count):
        engine.registry.put(f"a{i}", read_checkpoint(folder / f"a{i}", base.layout, Limits()))
    return engine


def run_engine(engine: Engine, requests: Tokens, names: list[str], new_tokens: int) -> Tokens:
    params = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0)
    sequences = [
        Sequence(i, CAUSAL_LM, ids, engine.registry.acquire(name), params, engine.base.eos_ids)
        for i, (ids, name) in enumerate(zip(requests, names, strict=True))
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.scheduler.unfinished():
        engine.step()
    return [sequence.output_ids for sequence in sequences]


def timed(run: Callable[[], Tokens]) -> tuple[float, Tokens]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def compare(location: str, count: int, options: argparse.Namespace) -> None:
    requests = prompts(location, options.requests, options.prompt_tokens)
    names = [f"a{i % count}" for i in range(options.requests)]
    pad = load_tokenizer(location).pad_token_id
    peft = peft_model(location, count, options.rank)
    with tempfile.TemporaryDirectory() as folder:
        peft.save_pretrained(folder)
        engine = make_engine(location, Path(folder), count, options.requests)
    warm = requests[:2]
    run_engine(engine, warm, names[:2], 2)
    run_peft(peft, warm, names[:2], 2, pad)
    ours, theirs = [], []
    for turn in range(options.rounds):
        seconds, a = timed(lambda: run_engine(engine, requests, names, options.new_tokens))
        ours.append(seconds)
        seconds, b = timed(lambda: run_peft(peft, requests, names, options.new_tokens, pad))
        theirs.append(seconds)
        print(f"  turn {turn + 1}: engine {ours[-1]:.1f} s, peft {theirs[-1]:.1f} s", flush=True)
    tokens = options.requests * options.new_tokens
    same = sum(x == y for x, y in zip(a, b, strict=True))
    ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    print(
        f"{count} adapters, {options.requests} requests: engine {tokens / min(ours):.0f} tokens/s, "
        f"peft {tokens / min(theirs):.0f} tokens/s, ratio {ratio:.2f}; same tokens in {same} of {options.requests}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8], help="distinct adapters; one table row each")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    location = resolve_base(options.base).location
    print(f"{options.base}, {torch.get_num_threads()} threads, rank {options.rank} on {len(TARGETS)} linears")
    for count in options.adapters:
        compare(location, count, options)


if __name__ == "__main__":
    main()
