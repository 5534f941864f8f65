"""A training from its recipe to the adapter on disk, and into a server where that is asked for."""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from adapters.checkpoint import CONFIG_FILE
from server.bases import BaseSource, load_tokenizer, resolve_base
from server.engine.base_model import generates, read_pooling
from server.engine.device import DTYPES, choose_device
from server.training.baseline import baseline
from server.training.checkpoint import CHECKPOINT_FILE, read_checkpoint
from server.training.classification import TextClassification
from server.training.data import InvalidData
from server.training.embedding import TextEmbedding
from server.training.examples import Evaluation, Example, Examples, TrainingTask, held_out
from server.training.generation import TextGeneration
from server.training.loop import Loop, better
from server.training.model import build_model, round_to, save_adapter
from server.training.publish import publish
from server.training.recipe import InvalidRecipe, Recipe
from server.training.report import (
    METRICS_FILE,
    PLOT_FILE,
    plot_loss,
    thinned,
    write_json,
    write_labels,
    write_predictions,
    write_readme,
)
from server.training.tagging import TextTagging

logger = logging.getLogger(__name__)


class TooBad(Exception):
    """The metric is worse than `min_metric`: the adapter is on disk, but not in the server."""


class Interrupted(Exception):
    """By Ctrl-C: what was learnt until then is on disk."""


@dataclass(frozen=True)
class Result:
    """What a training gave."""

    directory: Path
    metrics: dict[str, float]
    """On the held-out examples, of the adapter as it was saved."""
    baseline: dict[str, float]
    about: dict[str, str]
    """What there is to say of the adapter and its making."""


def train(recipe: Recipe) -> Result:
    """Raises InvalidRecipe, InvalidData, InvalidCheckpoint, BaseNotFound, TooBad, Interrupted, PublishError."""
    _check_directory(recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    source = resolve_base(recipe.base)
    tokenizer = load_tokenizer(source.location)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    task = make_task(recipe, source, tokenizer)
    examples = split_examples(recipe, task, longest(recipe, source, tokenizer))
    _check_metric(recipe, task)
    model = _model(recipe, task, source, tokenizer)
    identity = {"recipe": recipe.decisive, "data": _digest([*examples.learn, *examples.held_out])}
    loop = Loop(recipe, task, model, examples, identity)
    _introduce(recipe, task, loop)
    if recipe.resume and (checkpoint := read_checkpoint(recipe.out, identity)):
        loop.go_on_from(checkpoint)
        logger.info("goes on after step %d", loop.progress.step)
    recipe.out.mkdir(parents=True, exist_ok=True)
    if not recipe.resume:
        (recipe.out / CHECKPOINT_FILE).unlink(missing_ok=True)
    test = examples.held_out
    frozen = baseline(task, model, examples.learn, test) if recipe.baseline and test else {}
    finished = loop.run()
    round_to(loop.parameters, DTYPES[recipe.save_dtype])
    evaluation = loop.measure(test, generate=True) if finished and test else Evaluation({}, [])
    save_adapter(model, recipe.out, DTYPES[recipe.save_dtype])
    about = _about(recipe, source, loop)
    _report(recipe, loop, evaluation, frozen, about)
    if not finished:
        raise Interrupted(
            f"saved in {recipe.out} after step {loop.progress.step} of {len(loop.plan)}; --resume goes on"
        )
    (recipe.out / CHECKPOINT_FILE).unlink(missing_ok=True)
    _deliver(recipe, loop.metric, evaluation.metrics)
    return Result(recipe.out, evaluation.metrics, frozen, about)


def make_task(recipe: Recipe, source: BaseSource, tokenizer: PreTrainedTokenizerBase) -> TrainingTask:
    """Raises InvalidRecipe when the base has no such task."""
    decoder = generates(AutoConfig.from_pretrained(source.location))
    if recipe.task == "SEQ_CLS":
        return TextClassification(tokenizer, recipe.labels or ())
    if recipe.task == "TOKEN_CLS":
        return TextTagging(tokenizer, recipe.labels or ())
    if recipe.task == "FEATURE_EXTRACTION":
        return TextEmbedding(tokenizer, read_pooling(source.location) or ("last" if decoder else "mean"))
    if not decoder:
        raise InvalidRecipe(f"{recipe.base} is an encoder: it cannot generate, so CAUSAL_LM is not for it")
    return TextGeneration(tokenizer, recipe.chat, recipe.eval_samples, recipe.max_new_tokens)


def longest(recipe: Recipe, source: BaseSource, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of an example: what was asked for, as far as the base has positions."""
    positions = getattr(AutoConfig.from_pretrained(source.location), "max_position_embeddings", recipe.max_length)
    return min(recipe.max_length, positions, tokenizer.model_max_length)


def _check_directory(recipe: Recipe) -> None:
    checkpoint = recipe.out / CHECKPOINT_FILE
    if recipe.resume and not checkpoint.exists() and (recipe.out / CONFIG_FILE).exists():
        raise InvalidRecipe(f"{recipe.out} has a finished adapter: there is nothing to go on with")
    if recipe.overwrite or recipe.resume:
        return
    if checkpoint.exists():
        raise InvalidRecipe(f"{recipe.out} has an unfinished run: go on with --resume, or begin again with --overwrite")
    if recipe.out.is_dir() and any(recipe.out.iterdir()):
        raise InvalidRecipe(f"{recipe.out} is not empty: --overwrite writes over it")


def split_examples(recipe: Recipe, task: TrainingTask, limit: int) -> Examples:
    """limit: in tokens, of each text. Raises InvalidData."""
    examples = task.read(recipe.data)
    if recipe.eval_data:
        learn, test = examples, task.read(recipe.eval_data)
    else:
        sides = [held_out(example.source, recipe.eval_fraction) for example in examples]
        learn = [example for example, out in zip(examples, sides, strict=True) if not out]
        test = [example for example, out in zip(examples, sides, strict=True) if out]
    total = len(learn) + len(test)
    learn, test = ([e for e in part if e.length <= limit] for part in (learn, test))
    too_long = total - len(learn) - len(test)
    if too_long:
        logger.warning("%d examples of more than %d tokens are left out", too_long, limit)
    if not learn:
        raise InvalidData(f"{recipe.data}: nothing is left to learn from")
    if (recipe.patience or recipe.min_metric is not None) and not test:
        raise InvalidData("patience and min-metric need held-out examples, and there are none")
    return Examples(learn, test, too_long)


def _check_metric(recipe: Recipe, task: TrainingTask) -> None:
    if recipe.metric and recipe.metric not in task.metrics:
        raise InvalidRecipe(f"metric {recipe.metric!r} is not one of this task's: {', '.join(task.metrics)}")


def _model(recipe: Recipe, task: TrainingTask, source: BaseSource, tokenizer: PreTrainedTokenizerBase) -> Any:
    try:
        return build_model(recipe, task, source, tokenizer, choose_device(recipe.device))
    except ValueError as error:
        raise InvalidRecipe(str(error)) from error


def _introduce(recipe: Recipe, task: TrainingTask, loop: Loop) -> None:
    logger.info(
        "%s on %s: %d examples, %d held out%s; %d parameters are learnt; %d steps",
        recipe.task, recipe.base, len(loop.examples.learn), len(loop.examples.held_out),
        f", {len(task.labels)} labels" if task.labels else "",
        sum(parameter.numel() for parameter in loop.parameters.values()), len(loop.plan),
    )  # fmt: skip


def _digest(examples: Sequence[Example]) -> str:
    result = hashlib.sha256()
    for example in examples:
        result.update(repr((example.input_ids, example.target, example.others)).encode())
    return result.hexdigest()


def _about(recipe: Recipe, source: BaseSource, loop: Loop) -> dict[str, str]:
    learn, held_out = len(loop.examples.learn), len(loop.examples.held_out)
    adapter = f"rank {recipe.rank}, alpha {recipe.alpha}, on {', '.join(recipe.target_modules)}; {recipe.save_dtype}"
    batch = recipe.batch_size * recipe.accumulation
    return {
        "base": source.logical_name,
        "task": recipe.task,
        "adapter": adapter,
        "data": f"{learn} examples to learn from, {held_out} held out by a hash of their text",
        "training": f"{loop.progress.step} steps of {batch}, rate {recipe.learning_rate:g}, seed {recipe.seed}",
    }


def _report(
    recipe: Recipe, loop: Loop, evaluation: Evaluation, frozen: dict[str, float], about: dict[str, str]
) -> None:
    """Everything beside the weights."""
    examples, out, done, task = loop.examples, recipe.out, loop.progress, loop.task
    write_labels(out, task.labels, task.problem_type)
    plot_loss(out / PLOT_FILE, done, loop.metric)
    write_predictions(out, examples.held_out, evaluation)
    write_json(out / METRICS_FILE, {
        "metrics": evaluation.metrics, "baseline": frozen, "metric": loop.metric,
        "learnt": len(examples.learn), "held_out": len(examples.held_out), "too_long": examples.too_long,
        "steps": done.step, "of_steps": len(loop.plan), "tokens": done.tokens, "seconds": round(done.seconds, 1),
        "best_step": done.best_step, "evaluations": done.evaluations, "history": thinned(done.history),
        "recipe": recipe.decisive,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    })  # fmt: skip
    command = f"multilora train --base {recipe.base} --task {recipe.task} --data {shlex.quote(recipe.data.name)} …"
    write_readme(out, out.name, about, {**evaluation.metrics, **frozen}, command)


def _deliver(recipe: Recipe, metric: str, metrics: dict[str, float]) -> None:
    """Into the server, when it is good enough."""
    if recipe.min_metric is not None and better(metric, recipe.min_metric, metrics[metric]):
        raise TooBad(f"{metric} is {metrics[metric]:.4g}, and {recipe.min_metric:g} was asked for")
    if recipe.serve_at:
        name = recipe.name or recipe.out.resolve().name
        digest = publish(recipe.out, recipe.serve_at, name)
        logger.info("%s serves it as %s (%s)", recipe.serve_at, name, digest[:8])
