"""What 8-bit weights, and keys and values in 16 bits, cost: perplexity and agreement of the next token, in one run.

    python benchmarks/perplexity.py

Text: prompts.txt beside this file and the licence of the project, in windows of --window tokens, each a prompt whose
keys and values lie in the cache's pages and are read from there. For each form of weights and pages: exp(mean negative
log-likelihood) of each text, and the share of positions whose likeliest next token is the exact one's. Nothing here
depends on the machine's speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from adapters.batch import NO_SLOT
from adapters.products import QUANTIZED
from server.bases import load_tokenizer, resolve_base
from server.config import ServerConfig
from server.engine.attention import Span
from server.engine.base_model import load_base
from server.engine.device import DTYPES
from server.engine.engine import Engine
from server.engine.request import CAUSAL_LM, Batch, ScheduledSequence, Sequence

FORMS = [("", pages) for pages in DTYPES] + [(mode, pages) for mode in QUANTIZED for pages in ("float32", "float16")]
"""Weights and pages; the first is exact."""
HERE = Path(__file__).parent
TEXTS = {"prompts": HERE / "prompts.txt", "licence": HERE.parent / "LICENSE"}


@torch.inference_mode()
def all_logits(engine: Engine, ids: list[int]) -> Tensor:
    """[len(ids), vocabulary] of one sequence, over pages."""
    sequence = Sequence(0, CAUSAL_LM, ids, None)
    sequence.pages = list(range(-(-len(ids) // engine.runner.block_size)))
    item = ScheduledSequence(sequence, 0, len(ids), NO_SLOT)
    _, logits = engine.runner.forward(Batch((item,)), [Span(0, len(ids), 0, sequence.pages)], range(len(ids)))
    assert logits is not None
    return logits


def judge(engine: Engine, windows: list[list[int]]) -> tuple[float, list[int]]:
    """Perplexity, and the likeliest next token of every position."""
    losses: list[Tensor] = []
    best: list[int] = []
    for ids in windows:
        logits = all_logits(engine, ids)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none"))
        best += logits.argmax(-1).tolist()
    return float(torch.cat(losses).mean().exp()), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text, at most")
    options = parser.parse_args()
    location = resolve_base(options.base).location
    tokenizer = load_tokenizer(location)
    windows = {}
    for name, file in TEXTS.items():
        ids = tokenizer(file.read_text())["input_ids"][: options.tokens]
        windows[name] = [ids[i : i + options.window] for i in range(0, len(ids) - 1, options.window)]
    exact: dict[str, list[int]] = {}
    for form, pages in FORMS:
        config = ServerConfig(quantize=form, kv_cache_dtype=pages, kv_cache_bytes=256 << 20)
        engine = Engine(config, load_base(location), "base")
        figures = []
        for name, parts in windows.items():
            perplexity, best = judge(engine, parts)
            reference = exact.setdefault(name, best)
            agreement = sum(a == b for a, b in zip(best, reference, strict=True)) / len(best)
            figures.append(f"{name}: perplexity {perplexity:.2f}, same next token {agreement:.3f}")
        print(f"{form or 'exact':>12}, pages {pages:<8}  {';  '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
