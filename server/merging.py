"""`multilora merge`: several adapters of one base into a new checkpoint, without the base's weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DEFAULT_WEIGHT = 1.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The checkpoints with their weights, and how they are merged."""
    parser.add_argument(
        "adapters", nargs="+", type=weighted, metavar="PATH[=WEIGHT]", help="directory of a PEFT checkpoint [=1]"
    )
    parser.add_argument("--base", default="smollm2", metavar="…", help="the base model that they are for ['smollm2']")
    parser.add_argument("--out", type=Path, required=True, metavar="…", help="the directory to make")
    parser.add_argument(
        "--method", default="cat", metavar="…", help="cat (the exact sum), linear, ties, dare_linear, dare_ties ['cat']"
    )
    parser.add_argument(
        "--density", type=float, default=0.5, metavar="…", help="share of numbers kept, of TIES and DARE"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="…", help="of DARE's choice")


def weighted(text: str) -> tuple[Path, float]:
    """`PATH` or `PATH=WEIGHT`. Raises ValueError."""
    path, separator, weight = text.rpartition("=")
    return (Path(path), float(weight)) if separator else (Path(text), DEFAULT_WEIGHT)


def run_merge(given: argparse.Namespace) -> int:
    """Merge as the flags say. Returns the exit status: 1 for adapters that cannot be merged."""
    from adapters.adapter import Limits  # noqa: PLC0415  -- `--help` shall not wait for torch
    from adapters.checkpoint import read_checkpoint  # noqa: PLC0415
    from adapters.errors import InvalidAdapter  # noqa: PLC0415
    from adapters.merge import Merging, merge  # noqa: PLC0415
    from server.bases import BaseNotFound, resolve_base  # noqa: PLC0415
    from server.engine.base_model import UnsupportedBase  # noqa: PLC0415
    from server.engine.base_outline import read_outline  # noqa: PLC0415

    limits = Limits(max_lora_rank=sys.maxsize)
    try:
        layout = read_outline(resolve_base(given.base).location).layout
        adapters = []
        for path, _ in given.adapters:
            try:
                adapters.append(read_checkpoint(path, layout, limits))
            except InvalidAdapter as error:
                raise InvalidAdapter([f"{path}: {reason}" for reason in error.reasons]) from error
        how = Merging(given.method, given.density, given.seed)
        merge(adapters, [weight for _, weight in given.adapters], layout, given.out, how)
    except InvalidAdapter as error:
        print("\n".join(f"multilora: {reason}" for reason in error.reasons), file=sys.stderr)
        return 1
    except (BaseNotFound, UnsupportedBase, OSError) as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0
