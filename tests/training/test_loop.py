"""The loop: a broken run goes on to the same result, the base stays as it is, batches add up, patience ends it."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server.training.checkpoint import CHECKPOINT_FILE, InvalidCheckpoint, read_checkpoint
from server.training.examples import TrainingTask
from server.training.loop import Loop
from server.training.plan import Plan
from server.training.recipe import Recipe
from tests.training.support import parts, recipe_for, rows_for, write_rows

ID = {"run": 1}
TASKS = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", rows_for("SEQ_CLS"))


def loop_for(recipe: Recipe) -> Loop:
    task, examples, model = parts(recipe)
    recipe.out.mkdir(exist_ok=True)
    return Loop(recipe, task, model, examples, ID)


def without_dropout(loop: Loop) -> Loop:
    """transformers' own too, of some heads."""
    for module in loop.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return loop


def weights(loop: Loop) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in loop.parameters.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Break(Exception):
    """Ends a run where a power cut would."""


@pytest.mark.parametrize("task", TASKS)
def test_a_broken_run_goes_on_to_the_same_result(task: str, base_location: dict[str, str], tmp_path: Path) -> None:
    """With dropout, so that the random generators count too; with the best of two evaluations kept."""
    data = write_rows(tmp_path / "data.jsonl", rows_for(task))
    settings = {"dropout": 0.1, "checkpoint_every": 3, "patience": 5, "eval_every": 4, "schedule": "cosine"}
    base = base_location["tiny-bert" if task != "CAUSAL_LM" else "tiny-llama"]
    whole = loop_for(recipe_for(base, task, data, tmp_path / "whole", **settings))
    assert whole.run()
    broken = loop_for(recipe_for(base, task, data, tmp_path / "broken", **settings))
    step = broken._step

    def step_until_five(batches: Any) -> Any:
        if broken.progress.step == 5:
            raise Break
        return step(batches)

    broken._step = step_until_five  # type: ignore[method-assign]
    with pytest.raises(Break):
        broken.run()
    torch.manual_seed(99)
    again = loop_for(recipe_for(base, task, data, tmp_path / "broken", **settings))
    checkpoint = read_checkpoint(tmp_path / "broken", ID)
    assert checkpoint is not None
    assert checkpoint.progress.step == 3
    again.go_on_from(checkpoint)
    assert again.run()
    assert_same(weights(whole), weights(again))
    assert whole.progress.history == again.progress.history
    assert whole.progress.evaluations == again.progress.evaluations


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(
    data: Path, base_location: dict[str, str], tmp_path: Path
) -> None:
    loop = loop_for(recipe_for(base_location["tiny-bert"], "SEQ_CLS", data, tmp_path / "out"))
    step = loop._step

    def step_and_press(batches: Any) -> Any:
        if loop.progress.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(batches)

    loop._step = step_and_press  # type: ignore[method-assign]
    assert not loop.run()
    checkpoint = read_checkpoint(tmp_path / "out", ID)
    assert checkpoint is not None
    assert checkpoint.progress.step == loop.progress.step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as it was before"


@pytest.mark.parametrize("task", TASKS)
def test_the_base_is_the_same_afterwards(task: str, base_location: dict[str, str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", rows_for(task))
    base = base_location["tiny-bert" if task != "CAUSAL_LM" else "tiny-llama"]
    loop = loop_for(recipe_for(base, task, data, tmp_path / "out", epochs=1))
    before, learnt = _base_digest(loop), weights(loop)
    assert loop.run()
    assert _base_digest(loop) == before
    assert all(parameter.grad is None for parameter in loop.model.parameters() if not parameter.requires_grad)
    assert not any(torch.equal(learnt[name], value) for name, value in weights(loop).items())


def _base_digest(loop: Loop) -> str:
    result = hashlib.sha256()
    for name, parameter in loop.model.named_parameters():
        if not parameter.requires_grad:
            result.update(name.encode() + parameter.detach().numpy().tobytes())
    return result.hexdigest()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"])
def test_accumulated_batches_are_one_batch(task: str, base_location: dict[str, str], tmp_path: Path) -> None:
    """Of unequal numbers of targets: the mean is over targets, not over batches."""
    rows = rows_for(task, 6)
    for row in rows[:3]:
        for column in ("text", "completion"):
            if column in row:
                row[column] += " and a house and a car"
        if "tokens" in row:
            row |= {"tokens": [*row["tokens"], "and", "a", "car"], "tags": [*row["tags"], "O", "O", "thing"]}
    data = write_rows(tmp_path / "data.jsonl", rows)
    base = base_location["tiny-llama"]
    settings: dict[str, Any] = {"eval_fraction": 0, "epochs": 1, "learning_rate": 1e-2, "warmup": 0}
    recipes = [
        recipe_for(base, task, data, tmp_path / "one", **settings, batch_size=6),
        recipe_for(base, task, data, tmp_path / "three", **settings, batch_size=2, accumulation=3),
    ]
    one, three = (without_dropout(loop_for(recipe)) for recipe in recipes)
    assert one.run()
    assert three.run()
    assert (one.progress.step, three.progress.step) == (1, 1)
    assert one.progress.history[0]["loss"] == pytest.approx(three.progress.history[0]["loss"], rel=1e-5)
    for name, value in one._optimizer.state.items():
        assert name.shape == value["exp_avg"].shape
    moments = [[loop._optimizer.state[p]["exp_avg"] for p in loop.parameters.values()] for loop in (one, three)]
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_changes_nothing(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    base, settings = base_location["tiny-llama"], {"epochs": 1, "eval_fraction": 0.5}
    plain = loop_for(recipe_for(base, "SEQ_CLS", data, tmp_path / "plain", **settings))
    saving = loop_for(recipe_for(base, "SEQ_CLS", data, tmp_path / "saving", **settings, gradient_checkpointing=True))
    assert plain.run()
    assert saving.run()
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(saving)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_learns_too(task: str, base_location: dict[str, str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", rows_for(task))
    base = base_location["tiny-bert" if task != "CAUSAL_LM" else "tiny-llama"]
    recipe = recipe_for(base, task, data, tmp_path / "out", dtype="bfloat16", epochs=4, bias="lora_only")
    loop = loop_for(recipe)
    loop.measure_baseline()
    assert loop.progress.baseline
    assert loop.run()
    assert loop.progress.history[-1]["loss"] < loop.progress.history[0]["loss"]
    assert loop.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loop.parameters.values()} == {torch.float32}


class Scripted:
    """Evaluations with given figures, so that patience can be watched; the rest is the task's."""

    def __init__(self, task: TrainingTask, losses: list[float]) -> None:
        self._task, self._losses = task, iter(losses)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def evaluate(self, *_: Any) -> Any:
        from server.training.examples import Evaluation

        return Evaluation({"loss": next(self._losses)}, [])


def test_patience_keeps_the_best(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    settings = {"patience": 2, "metric": "loss", "eval_every": 1, "epochs": 9, "checkpoint_every": 1}
    recipe = recipe_for(base_location["tiny-bert"], "SEQ_CLS", data, tmp_path / "out", **settings)
    loop = loop_for(recipe)
    loop.task = Scripted(loop.task, [3.0, 2.0, 2.5, 2.0, 1.0])
    seen: dict[int, dict[str, Any]] = {}
    step = loop._step

    def watch(batches: Any) -> Any:
        seen[loop.progress.step] = weights(loop)
        return step(batches)

    loop._step = watch  # type: ignore[method-assign]
    assert loop.run()
    assert (loop.progress.step, loop.progress.best_step, loop.progress.best) == (4, 2, 2.0)
    assert_same(weights(loop), seen[2])


def test_a_loss_without_end_is_an_error(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    loop = loop_for(recipe_for(base_location["tiny-bert"], "SEQ_CLS", data, tmp_path / "out"))
    with torch.no_grad():
        next(iter(loop.parameters.values())).fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 1: try a lower learning rate, or more examples"
    ):
        loop.run()


def test_a_gradient_without_end_is_an_error(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    loop = loop_for(recipe_for(base_location["tiny-bert"], "SEQ_CLS", data, tmp_path / "out"))
    before = weights(loop)
    next(iter(loop.parameters.values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"the gradient is (inf|nan) at step 1"):
        loop.run()
    assert_same(before, weights(loop))


def test_a_metric_that_is_no_number_is_an_error(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    loop = loop_for(recipe_for(base_location["tiny-bert"], "SEQ_CLS", data, tmp_path / "out", metric="loss"))
    loop.task = Scripted(loop.task, [float("nan")])
    with pytest.raises(FloatingPointError, match="loss is nan after step"):
        loop.run()


def test_a_checkpoint_of_another_run_is_refused(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    loop = loop_for(recipe_for(base_location["tiny-bert"], "SEQ_CLS", data, tmp_path / "out", epochs=1))
    loop.run()
    assert read_checkpoint(tmp_path / "out", ID) is not None
    with pytest.raises(InvalidCheckpoint, match="is of a run with another run; --overwrite begins again"):
        read_checkpoint(tmp_path / "out", {"run": 2})
    file = tmp_path / "out" / CHECKPOINT_FILE
    assert all("random" in name or "." in name for name in load_file(file))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InvalidCheckpoint, match="is broken"):
        read_checkpoint(tmp_path / "out", ID)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path, ID) is None


def plan(lengths: list[int], **settings: Any) -> Plan:
    return Plan(lengths, recipe_for("base", "SEQ_CLS", Path("data"), Path("out"), **settings))


def test_each_epoch_takes_every_example_once_in_another_order() -> None:
    made = plan(list(range(20)), epochs=2, batch_size=3, accumulation=2)
    assert made.steps_per_epoch == 4
    epochs = [made.steps[:4], made.steps[4:]]
    flat = [[i for step in epoch for batch in step for i in batch] for epoch in epochs]
    assert [sorted(each) for each in flat] == [list(range(20))] * 2
    assert flat[0] != flat[1]
    assert plan(list(range(20)), epochs=2, batch_size=3, accumulation=2).steps == made.steps


def test_buckets_hold_similar_lengths() -> None:
    lengths = [i % 10 for i in range(40)]
    for step in plan(lengths, batch_size=4, epochs=1).steps:
        assert len({lengths[i] for i in step[0]}) == 1
    mixed = plan(lengths, batch_size=4, epochs=1, bucket=False).steps
    assert any(len({lengths[i] for i in step[0]}) > 1 for step in mixed)


def test_no_batch_is_of_one() -> None:
    made = plan([1] * 9, epochs=1, batch_size=4)
    assert sorted(len(step[0]) for step in made.steps) == [4, 5]


def test_steps_bound_a_run() -> None:
    assert len(plan([1] * 20, epochs=1, batch_size=4, max_steps=12)) == 12, "whatever epochs says"
    made = plan([1] * 20, epochs=5, batch_size=4, max_steps=7)
    assert len(made) == 7
    assert [made.evaluates_after(done) for done in (4, 5, 7)] == [False, True, True]
