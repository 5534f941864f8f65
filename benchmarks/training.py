"""The memory of a training: the base once, the adapter with its gradients and AdamW's moments, and activations.

    python -m benchmarks.training          # about a minute

After some steps all tensors that are alive are counted, each storage once: they should be the base, and three times
the adapter in fp32 (itself and AdamW's two moments; gradients are let go). Beside them the process needs what libraries
and the allocator keep: resident memory (VmRSS of /proc) is read before the base is loaded and after the steps. Then one
step on long texts at its highest, with and without gradient checkpointing. Linux only.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Verdicts, arguments, introduce
from server.bases import load_tokenizer, resolve_base
from server.engine.base_model import read_config
from server.training.loop import Loop
from server.training.model import build_model
from server.training.prepare import longest, make_task, split_examples
from server.training.recipe import Recipe, make_recipe

BASE = "smollm2"
SHORT, LONG = "a short text", "a text that goes on and on, " * 40
LONG_BATCH = 4
MB = 1e6


def resident(name: str = "VmRSS") -> float:
    """Bytes; VmHWM: at its highest since it was last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in status if line.startswith(f"{name}:")).split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def recipe_for(folder: Path, text: str, count: int, **settings: Any) -> Recipe:
    data = folder / "data.jsonl"
    row = {"prompt": text, "completion": text}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    common = {"base": BASE, "task": "CAUSAL_LM", "data": data, "out": folder, "eval_fraction": 0, "max_length": 4096}
    return make_recipe({**common, "max_steps": 3, **settings})


def storages(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def run(recipe: Recipe) -> tuple[Loop, float]:
    """A loop after its steps, and how much memory the steps took at their highest, in bytes."""
    source = resolve_base(recipe.base)
    tokenizer = load_tokenizer(source.location)
    config = read_config(source.location)
    task = make_task(recipe, source, config, tokenizer)
    model = build_model(recipe, task, source, tokenizer, torch.device("cpu"))
    examples = split_examples(recipe, task, longest(recipe, config, tokenizer))
    loop = Loop(recipe, task, model, examples, {})
    before = resident()
    reset_peak()
    loop.run()
    return loop, resident("VmHWM") - before


def main() -> None:
    options = arguments(__doc__).parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("memory is read from /proc: Linux only")
    introduce("the memory of a training")
    verdicts = Verdicts()
    settings = [("plain", False)] if options.quick else [("plain", False), ("with gradient checkpointing", True)]
    with tempfile.TemporaryDirectory() as folder:
        before = resident()
        loop, _ = run(recipe_for(Path(folder), SHORT, 8, batch_size=1, rank=16))
        gc.collect()
        grown = resident() - before
        base, learnt = (storages(p for p in loop.model.parameters() if p.requires_grad is of) for of in (False, True))
        alive = storages(item for item in gc.get_objects() if isinstance(item, torch.Tensor))
        note = f"{alive / MB:.1f} MB; base {base / MB:.1f}, adapter {learnt / MB:.1f}"
        verdicts.at_most("all tensors / base once and three adapters", alive / (base + 3 * learnt), 1.01, note)
        verdicts.told("MB of resident memory beside them", (grown - alive) / MB)
        del loop
        for name, checkpointing in settings:
            recipe = recipe_for(
                Path(folder), LONG, LONG_BATCH, batch_size=LONG_BATCH, max_steps=1, gradient_checkpointing=checkpointing
            )
            peak = run(recipe)[1]
            verdicts.told(f"MB of activations, {LONG_BATCH} long texts, {name}", peak / MB)
            gc.collect()
    verdicts.summary()


if __name__ == "__main__":
    main()
