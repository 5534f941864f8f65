"""A training from its recipe to the adapter on disk, and into a server where that is asked for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adapters.checkpoint import CONFIG_FILE, LABELS_FILE, WEIGHTS_FILE
from server.bases import BaseSource, load_tokenizer, resolve_base
from server.config import ServerConfig
from server.engine.base_model import read_config
from server.engine.device import DTYPES, choose_device
from server.inspection import inspect
from server.training.checkpoint import CHECKPOINT_FILE, read_checkpoint
from server.training.examples import Evaluation, Example, TrainingTask
from server.training.loop import Loop, better
from server.training.model import build_model, round_to, save_adapter
from server.training.prepare import choose_padding, longest, make_task, split_examples
from server.training.publish import publish
from server.training.recipe import InvalidRecipe, Recipe
from server.training.report import (
    METRICS_FILE,
    PLOT_FILE,
    PREDICTIONS_FILE,
    README_FILE,
    plot_loss,
    thinned,
    write_json,
    write_labels,
    write_predictions,
    write_readme,
)

WRITTEN = (CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE, METRICS_FILE, PREDICTIONS_FILE, PLOT_FILE, README_FILE)
"""Into the directory of an adapter."""

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
    """Raises InvalidRecipe, InvalidData, InvalidCheckpoint, BaseNotFound, DeviceNotAvailable, UnsupportedBase, OSError,
    FloatingPointError, TooBad, Interrupted, PublishError.
    """
    _check_directory(recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    source, device = resolve_base(recipe.base), choose_device(recipe.device)
    config, tokenizer = read_config(source.location), load_tokenizer(source.location)
    choose_padding(tokenizer, config.pad_token_id)
    task = make_task(recipe, source, config, tokenizer)
    examples = split_examples(recipe, task, longest(recipe, config, tokenizer))
    _check_metric(recipe, task)
    model = _model(recipe, task, source, tokenizer, device)
    _check_with_server(recipe, task, model)
    identity = {**recipe.decisive, "device": device.type, "examples": _digest([*examples.learn, *examples.held_out])}
    loop = Loop(recipe, task, model, examples, identity)
    _introduce(recipe, task, loop)
    _begin(recipe, loop, identity)
    if recipe.baseline and examples.held_out:
        loop.measure_baseline()
    finished = loop.run()
    about = _about(recipe, source, loop)
    evaluation = _save(recipe, loop, about, finished)
    if not finished:
        raise Interrupted(
            f"saved in {recipe.out} after step {loop.progress.step} of {len(loop.plan)}; --resume goes on"
        )
    (recipe.out / CHECKPOINT_FILE).unlink(missing_ok=True)
    _deliver(recipe, loop.metric, evaluation.metrics)
    return Result(recipe.out, evaluation.metrics, loop.progress.baseline, about)


def _check_directory(recipe: Recipe) -> None:
    if recipe.out.exists() and not recipe.out.is_dir():
        raise InvalidRecipe(f"{recipe.out} is no directory")
    checkpoint = recipe.out / CHECKPOINT_FILE
    if recipe.resume and not checkpoint.exists() and (recipe.out / CONFIG_FILE).exists():
        raise InvalidRecipe(f"{recipe.out} has a finished adapter: there is nothing to go on with")
    if recipe.overwrite or recipe.resume:
        return
    if checkpoint.exists():
        raise InvalidRecipe(f"{recipe.out} has an unfinished run: go on with --resume, or begin again with --overwrite")
    if recipe.out.is_dir() and any(recipe.out.iterdir()):
        raise InvalidRecipe(f"{recipe.out} is not empty: --overwrite writes over it")


def _check_metric(recipe: Recipe, task: TrainingTask) -> None:
    if recipe.metric and recipe.metric not in task.metrics:
        raise InvalidRecipe(f"metric {recipe.metric!r} is not one of this task's: {', '.join(task.metrics)}")


def _model(
    recipe: Recipe, task: TrainingTask, source: BaseSource, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Any:
    try:
        return build_model(recipe, task, source, tokenizer, device)
    except ValueError as error:
        raise InvalidRecipe(str(error)) from error


def _check_with_server(recipe: Recipe, task: TrainingTask, model: Any) -> None:
    """What the server would refuse is not trained. Raises InvalidRecipe with its reasons."""
    config = ServerConfig(base=recipe.base, max_lora_rank=max(recipe.rank, ServerConfig().max_lora_rank))
    with TemporaryDirectory() as folder:
        save_adapter(model, Path(folder), DTYPES[recipe.save_dtype])
        write_labels(Path(folder), task.labels, task.problem_type)
        reasons = inspect(Path(folder), config).reasons
    if reasons:
        raise InvalidRecipe(f"the server would refuse such an adapter: {'; '.join(reasons)}")


def _begin(recipe: Recipe, loop: Loop, identity: dict[str, Any]) -> None:
    """Make the directory; go on from its checkpoint, or remove what an earlier run left."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    if not recipe.resume:
        for name in (CHECKPOINT_FILE, *WRITTEN):
            (recipe.out / name).unlink(missing_ok=True)
    elif checkpoint := read_checkpoint(recipe.out, identity):
        loop.go_on_from(checkpoint)
        logger.info("goes on after step %d", loop.progress.step)


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
    how = "" if recipe.eval_data else " by a hash of their text"
    return {
        "base": source.logical_name,
        "task": recipe.task,
        "adapter": adapter,
        "data": f"{learn} examples to learn from, {held_out} held out{how}",
        "training": f"{loop.progress.step} steps of {batch}, rate {recipe.learning_rate:g}, seed {recipe.seed}",
    }


def _save(recipe: Recipe, loop: Loop, about: dict[str, str], finished: bool) -> Evaluation:
    """The adapter first, then what is measured of it. Raises Interrupted."""
    examples, out, done, task = loop.examples, recipe.out, loop.progress, loop.task
    round_to(loop.parameters, DTYPES[recipe.save_dtype])
    save_adapter(loop.model, out, DTYPES[recipe.save_dtype])
    write_labels(out, task.labels, task.problem_type)
    plot_loss(out / PLOT_FILE, done, loop.metric)
    evaluation = Evaluation({}, [])
    if finished and examples.held_out:
        try:
            evaluation = loop.measure(examples.held_out, generate=True)
        except KeyboardInterrupt:
            raise Interrupted(f"saved in {out}, but not measured; --resume measures it") from None
    write_predictions(out, examples.held_out, evaluation)
    write_json(out / METRICS_FILE, {
        "metrics": evaluation.metrics, "baseline": done.baseline, "metric": loop.metric,
        "learnt": len(examples.learn), "held_out": len(examples.held_out), "too_long": examples.too_long,
        "steps": done.step, "of_steps": len(loop.plan), "tokens": done.tokens, "seconds": round(done.seconds, 1),
        "best_step": done.best_step, "evaluations": done.evaluations, "history": thinned(done.history),
        "recipe": recipe.decisive,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    })  # fmt: skip
    write_readme(out, out.name, about, {**evaluation.metrics, **done.baseline}, recipe.command)
    return evaluation


def _deliver(recipe: Recipe, metric: str, metrics: dict[str, float]) -> None:
    """Into the server, when it is good enough."""
    floor = recipe.min_metric
    if floor is not None and not (metrics[metric] == floor or better(metric, metrics[metric], floor)):
        raise TooBad(f"{metric} is {metrics[metric]:.4g}, and {floor:g} was asked for")
    if recipe.serve_at:
        digest = publish(recipe.out, recipe.serve_at, recipe.served_name)
        logger.info("%s serves it as %s (%s)", recipe.serve_at, recipe.served_name, digest[:8])
