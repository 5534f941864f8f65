"""Recipe: everything that a training is told, from a YAML file and flags. Its fields are the flags."""

from __future__ import annotations

import argparse
import shlex
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

LOWER_IS_BETTER = ("loss", "perplexity", "mae", "rmse")
"""Of all tasks' metrics."""
WHERE_IT_RUNS = frozenset({
    "data", "eval_data", "out", "resume", "overwrite", "serve_at", "name", "min_metric", "threads", "checkpoint_every",
    "baseline",
})  # fmt: skip
"""Fields that change nothing of what is learnt: a run may go on with others. Of the data its content counts."""

Share = Annotated[float, Field(ge=0, lt=1)]


class InvalidRecipe(ValueError):
    """A setting that is unknown, out of its range, or contradicts another."""


class Recipe(BaseModel):
    """What `multilora train` can be told. Names are peft's and transformers'."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field("smollm2", description="the base model: smollm2, minilm, a directory, or a hub id")
    task: Literal["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"] = Field(description="peft's task_type")
    data: Path = Field(description="training examples: .jsonl, .csv or .parquet")
    out: Path = Field(description="the directory to make: the adapter, its figures, a plot of the loss")

    labels: list[str] | None = Field(
        None, description="in this order, with commas between (default: those found, sorted)"
    )
    eval_data: Path | None = Field(None, description="held-out examples; else a share of the data is held out")
    eval_fraction: Share = Field(0.1, description="share that is held out, by a hash of the text")
    eval_samples: int = Field(
        200, ge=1, description="CAUSAL_LM: held-out examples that are generated for chrF and BLEU"
    )
    max_new_tokens: int = Field(128, ge=1, description="CAUSAL_LM: the longest of those answers, in tokens")
    max_length: int = Field(512, ge=2, description="examples of more tokens are left out, and counted")
    chat: bool = Field(True, description="CAUSAL_LM: a prompt is a user's message, where the base has a chat template")

    rank: int = Field(8, ge=1, le=1024)
    alpha: int = Field(16, gt=0, description="scaling is alpha / rank")
    use_rslora: bool = Field(False, description="scaling is alpha / √rank")
    target_modules: list[str] = Field(["all-linear"], min_length=1, description="names of layers, with commas between")
    bias: Literal["none", "lora_only"] = Field("none", description="lora_only: the target modules' biases are learnt")
    dropout: Share = Field(0.0, description="of the inputs of A")

    learning_rate: float = Field(5e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    warmup: Share = Field(0.05, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    epochs: int = Field(3, ge=1)
    max_steps: int = Field(0, ge=0, description="so many steps, whatever epochs says (0: as epochs says)")
    batch_size: int = Field(16, ge=1, description="examples computed at once")
    accumulation: int = Field(1, ge=1, description="batches of one step")
    bucket: bool = Field(True, description="batches of similar lengths, in random order")
    seed: int = Field(0, ge=0)
    eval_every: int = Field(0, ge=0, description="steps between evaluations (0: after each epoch)")
    patience: int = Field(
        0, ge=0, description="end after so many evaluations without a better one, keep the best (0: no)"
    )
    metric: str = Field("", description="what is best, and what min-metric is about (default: the task's own)")
    baseline: bool = Field(False, description="measure the frozen base with a linear head too")

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the base's products while training")
    save_dtype: Literal["float16", "float32", "bfloat16"] = Field("float16", description="of the adapter's file")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where it runs: auto (a GPU where there is one), cpu, cuda"
    )
    threads: int = Field(0, ge=0, description="threads of a torch operation (0: one for each core)")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints (0: with each evaluation)")
    resume: bool = Field(False, description="go on from the checkpoint in the directory")
    overwrite: bool = Field(False, description="begin again, whatever is in the directory")

    serve_at: str = Field("", description="put the adapter into the server there (its key: $MULTILORA_API_KEY)")
    name: str = Field("", description="its name there (default: the directory's)")
    min_metric: float | None = Field(
        None, description="not if the metric is worse than this; the exit status is then 1"
    )

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.labels is not None and self.task not in ("SEQ_CLS", "TOKEN_CLS"):
            raise ValueError(f"{self.task} has no labels")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("a label occurs twice")
        if self.task == "FEATURE_EXTRACTION" and self.batch_size < 2:
            raise ValueError("the negatives of FEATURE_EXTRACTION are the others of a batch: batch_size must be over 1")
        self._check_name()
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other")
        return self

    def _check_name(self) -> None:
        from adapters.registry import NAME_PATTERN, is_name  # noqa: PLC0415  -- `--help` shall not wait for torch

        if self.serve_at and not is_name(self.served_name):
            raise ValueError(f"the name {self.served_name!r} is none that a server takes: {NAME_PATTERN}")

    @property
    def served_name(self) -> str:
        """In the server at `serve_at`."""
        return self.name or self.out.resolve().name

    @property
    def command(self) -> str:
        """That trains so again, with the settings that were given."""
        given = [name for name in type(self).model_fields if name in self.model_fields_set - WHERE_IT_RUNS]
        words = ["multilora", "train", "--data", self.data.name, "--out", self.out.name]
        for name in given:
            value, flag = getattr(self, name), name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", ",".join(value) if isinstance(value, list) else str(value)]
        return shlex.join(words)

    @property
    def decisive(self) -> dict[str, Any]:
        """Every field that the result depends on, as JSON has it."""
        return self.model_dump(mode="json", exclude=set(WHERE_IT_RUNS))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--config FILE`, and a flag for each field of Recipe; those not given stay unset."""
    parser.add_argument("--config", type=Path, metavar="…", help="a YAML file with these settings; flags go over it")
    for name, item in Recipe.model_fields.items():
        flag = "--" + name.replace("_", "-")
        default = "" if item.is_required() else f" [{item.get_default(call_default_factory=True)!r}]"
        text = f"{item.description or ''}{default}".strip().replace("%", "%%")
        kind = item.annotation
        if kind is bool:
            parser.add_argument(flag, help=text, default=None, action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(flag, help=text, default=None, choices=typing.get_args(kind))
        elif name in ("labels", "target_modules"):
            parser.add_argument(flag, help=text, default=None, type=lambda given: given.split(","), metavar="…")
        else:
            parser.add_argument(flag, help=text, default=None, metavar="…")


def load_recipe(arguments: Mapping[str, Any]) -> Recipe:
    """Flags over the YAML file over the defaults; paths in the file are relative to it. Raises InvalidRecipe."""
    config = arguments.get("config")
    values = {} if config is None else _read_yaml(config)
    values |= {name: given for name in Recipe.model_fields if (given := arguments.get(name)) is not None}
    return make_recipe(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Raises InvalidRecipe with every reason."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        reasons = []
        for fault in error.errors():
            place = ".".join(map(str, fault["loc"])).replace("_", "-")
            reasons.append(f"{place}: {fault['msg']}" if place else fault["msg"].removeprefix("Value error, "))
        raise InvalidRecipe("; ".join(reasons)) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml  # noqa: PLC0415  -- of the extra `train`

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRecipe(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRecipe(f"{file} is not a YAML mapping of settings")
    for name in ("data", "eval_data", "out", "base"):
        if isinstance(values.get(name), str) and (name != "base" or values[name].startswith(".")):
            values[name] = str(file.parent / values[name])
    return values
