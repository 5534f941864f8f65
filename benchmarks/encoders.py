"""An encoder's requests a second against `peft`'s mixed batch, and against the base alone in our engine; in one run.

    python -m benchmarks.encoders                       # about three minutes
    python -m benchmarks.encoders --tasks SEQ_CLS

MiniLM, 32 adapters of rank 16 on all linears (saved in fp16), requests of mixed lengths: log-normal, 25 tokens on
average. Ours: all requests queued, Engine.step until none is left. peft: right-padded batches of 32 with
`adapter_names`, in order of arrival; sorted by length too, which no server could do, to be seen beside it. Base alone:
the same texts as embeddings of the base in the same engine. In turns; values are compared, too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from adapters.layout import layout_of
from benchmarks.common import (
    LABELS,
    Tokens,
    Verdicts,
    add_sequence,
    arguments,
    cut_prompts,
    in_turns,
    introduce,
    make_adapter,
    make_engine,
    ratio,
    save_adapter,
    seconds,
    with_adapters,
)
from server.bases import resolve_base
from server.engine.engine import Engine
from server.engine.request import FEATURE_EXTRACTION, SEQ_CLS

BASE = "minilm"
BATCH = 32
MEAN_TOKENS = 25
SIGMA = 0.8
LONGEST = 256
TOLERANCE = 1e-4
Values = list[Any]


def lengths(count: int) -> list[int]:
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, count)
    return [int(n) for n in np.clip(drawn, 3, LONGEST)]


def run_engine(engine: Engine, requests: Tokens, names: list[str | None]) -> Values:
    """The values of every request, in order."""
    values: dict[int, Any] = {}
    for i, (ids, name) in enumerate(zip(requests, names, strict=True)):
        add_sequence(engine, i, ids, name)
    while engine.scheduler.unfinished():
        for output in engine.step():
            values[output.sequence.id] = output.values
    return [values[i] for i in range(len(requests))]


def peft_model(location: str, folder: Path, count: int, task: str) -> Any:
    kind: Any = AutoModelForSequenceClassification if task == SEQ_CLS else AutoModel
    config = AutoConfig.from_pretrained(location, num_labels=LABELS)
    model = kind.from_pretrained(location, config=config, dtype=torch.float32)
    layout = layout_of(model.base_model, model.base_model_prefix, model.config.hidden_size, False)
    for i in range(count):
        save_adapter(layout, folder / f"a{i}", i, task)
    return with_adapters(model, folder, count)


@torch.inference_mode()
def run_peft(model: Any, requests: Tokens, names: list[str], order: list[int]) -> Values:
    """Padded batches of BATCH in this order of the requests; the values in the requests' own."""
    values: Values = [None] * len(requests)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        width = max(len(requests[i]) for i in rows)
        mask = torch.tensor([[1] * len(requests[i]) + [0] * (width - len(requests[i])) for i in rows])
        ids = torch.tensor([requests[i] + [0] * (width - len(requests[i])) for i in rows])
        output = model(input_ids=ids, attention_mask=mask, adapter_names=[names[i] for i in rows])
        for row, i in enumerate(rows):
            if hasattr(output, "logits"):
                values[i] = output.logits[row].numpy()
            else:
                pooled = output.last_hidden_state[row, : len(requests[i])].mean(0)
                values[i] = torch.nn.functional.normalize(pooled, dim=0).numpy()
    return values


def compare(task: str, options: argparse.Namespace, verdicts: Verdicts) -> None:
    location = resolve_base(BASE).location
    requests = cut_prompts(location, lengths(options.requests))
    count = options.adapters
    names = [f"a{i * 7 % count}" for i in range(len(requests))]
    engine = make_engine(
        BASE,
        lambda layout: {f"a{i}": make_adapter(layout, i, task) for i in range(count)},
        max_loras=count,
        max_num_batched_tokens=options.step_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        peft = peft_model(location, Path(folder), count, task)
    arrival = list(range(len(requests)))
    by_length = sorted(arrival, key=lambda i: len(requests[i]))
    ours, theirs = run_engine(engine, requests, [*names]), run_peft(peft, requests, names, arrival)
    worst = max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(ours, theirs, strict=True))
    variants: dict[str, Callable[[], object]] = {
        "adapters": partial(run_engine, engine, requests, [*names]),
        "base": partial(run_engine, engine, requests, [None] * len(requests)),
        "peft": partial(run_peft, peft, requests, names, arrival),
        "peft sorted": partial(run_peft, peft, requests, names, by_length),
    }
    times = in_turns({name: partial(seconds, run) for name, run in variants.items()}, options.rounds)
    per_s = {name: len(requests) / min(taken) for name, taken in times.items()}
    equal = "equal" if worst <= TOLERANCE else "NOT EQUAL"
    verdicts.at_least(
        f"{task}: requests/s over peft", ratio(times["peft"], times["adapters"]), 4.0,
        f"{per_s['adapters']:.0f} against {per_s['peft']:.0f}; values {equal} ({worst:.1e})",
    )  # fmt: skip
    verdicts.told(f"{task}: over peft sorted by length", ratio(times["peft sorted"], times["adapters"]))
    verdicts.at_least(f"{task}: over the base alone", ratio(times["base"], times["adapters"]), 0.85)


def main() -> None:
    parser = arguments(__doc__)
    tasks = (SEQ_CLS, FEATURE_EXTRACTION)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, metavar="task", help=", ".join(tasks))
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=0, help="default 512, quick 128")
    parser.add_argument("--rounds", type=int, default=0, help="default 7, quick 2")
    parser.add_argument("--step-tokens", type=int, default=1024, help="max_num_batched_tokens of the engine")
    options = parser.parse_args()
    options.requests = options.requests or (128 if options.quick else 512)
    options.rounds = options.rounds or (2 if options.quick else 7)
    introduce(f"MiniLM, {options.adapters} adapters, {options.requests} requests of mixed lengths, in turns")
    verdicts = Verdicts()
    for task in options.tasks:
        compare(task, options, verdicts)
    verdicts.summary()


if __name__ == "__main__":
    main()
