"""`multilora train` as a person runs it: exit statuses, what it says, killed and gone on, into a running server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from server.cli import main
from server.keys import make_key
from server.training.checkpoint import CHECKPOINT_FILE
from tests.support import Live, live_server, relative, service_for
from tests.training.support import rows_for, write_rows

QUICK = ["--epochs", "2", "--batch-size", "8", "--learning-rate", "3e-3", "--eval-fraction", "0.25"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", rows_for("SEQ_CLS"))


def flags(base: str, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--base", base, "--task", "SEQ_CLS", "--data", str(data), "--out", str(out), *QUICK, *more]


def test_a_directory_is_not_written_over(
    data: Path, base_location: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(base_location["tiny-bert"], data, tmp_path / "out")
    assert main(given) == 0
    assert main(given) == 2
    assert "is not empty: --overwrite writes over it" in capsys.readouterr().err
    assert main([*given, "--resume"]) == 2
    assert "has a finished adapter: there is nothing to go on with" in capsys.readouterr().err
    assert main([*given, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--target-modules", "query,absent"], "the base has no linear layers absent, only dense, key, query, value"),
        (["--rank", "-1"], "rank: Input should be greater than or equal to 1"),
        (["--task", "CAUSAL_LM"], "is an encoder: it cannot generate"),
        (["--base", "./absent"], "does not exist"),
        (["--device", "cuda"], "device cuda needs an NVIDIA GPU"),
        (["--eval-fraction", "0", "--min-metric", "0.5"], "need held-out examples"),
        (["--max-length", "2"], "nothing is left to learn from"),
        (["--metric", "r2", "--patience", "1"], "metric 'r2' is not one of this task's"),
    ],
)
def test_faults_are_told_and_leave_nothing(
    more: list[str], reason: str, data: Path, base_location: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(flags(base_location["tiny-bert"], data, tmp_path / "out", *more)) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fault_in_the_data_has_its_line(
    base_location: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data.jsonl", [*rows_for("SEQ_CLS", 3), {"text": "no label"}])
    assert main(flags(base_location["tiny-bert"], data, tmp_path / "out")) == 2
    assert "data.jsonl:4: there is no 'label', only 'text'" in capsys.readouterr().err


def command(*given: str) -> list[str]:
    return [sys.executable, "-m", "server", *given]


def wait_for_step(process: Any, step: int) -> None:
    """Until the log tells of this step's evaluation."""
    for line in process.stderr:
        if f"step {step}:" in line:
            return
    raise AssertionError("it ended before")


def test_a_killed_run_goes_on_to_the_same_adapter(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL somewhere after the third step; the next command takes up the last checkpoint."""
    more = ["--eval-every", "1", "--epochs", "8", "--dropout", "0.1"]
    base = base_location["tiny-bert"]
    assert main(flags(base, data, tmp_path / "whole", *more)) == 0
    given = flags(base, data, tmp_path / "killed", *more)
    with subprocess.Popen(command(*given), stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, 3)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / CHECKPOINT_FILE).exists()
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    assert main(given) == 2, "an unfinished run is not begun again by itself"
    assert main([*given, "--resume"]) == 0
    names = ("adapter_model.safetensors", "labels.json", "predictions.jsonl")
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_saves_what_is_there(data: Path, base_location: dict[str, str], tmp_path: Path) -> None:
    given = flags(base_location["tiny-bert"], data, tmp_path / "out", "--eval-every", "1", "--epochs", "200")
    with subprocess.Popen(command(*given), stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, 2)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert "--resume goes on" in said
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 2 <= report["steps"] < report["of_steps"]
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (tmp_path / "out" / CHECKPOINT_FILE).exists()


def predictions(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]


def ask(live: Live, name: str, texts: list[str], key: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{live.url}/v1/predict", json={"task": name, "inputs": texts}, headers=headers)


def test_into_a_running_server(
    data: Path, base_location: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Served a moment later, with the trainer's own predictions; not when it is bad, or the key is wrong."""
    key = make_key(tmp_path / "keys.json", "trainer", rights=["infer", "admin"])
    base = base_location["tiny-bert"]
    service = service_for(base, "tiny", api_key_file=str(tmp_path / "keys.json"))
    with live_server(service) as live:
        into = ["--serve-at", live.url, "--name", "colours"]
        monkeypatch.setitem(os.environ, "MULTILORA_API_KEY", "wrong")
        assert main(flags(base, data, tmp_path / "refused", *into)) == 1
        assert "answered 401" in capsys.readouterr().err
        monkeypatch.setitem(os.environ, "MULTILORA_API_KEY", key)
        assert main(flags(base, data, tmp_path / "bad", *into, "--min-metric", "1.01")) == 1
        assert "and 1.01 was asked for" in capsys.readouterr().err
        assert (tmp_path / "bad" / "adapter_model.safetensors").exists()
        assert ask(live, "colours", ["the red fox"], key).status_code == 404
        assert main(flags(base, data, tmp_path / "good", *into, "--min-metric", "0.01")) == 0
        rows = predictions(tmp_path / "good")
        results = ask(live, "colours", [row["text"] for row in rows], key).json()["results"]
    assert [result["label"] for result in results] == [row["predicted"] for row in rows]
    for row, result in zip(rows, results, strict=True):
        assert relative([*result["scores"].values()], _softmax(row["logits"])) < 1e-4


def _softmax(logits: list[float]) -> Any:
    import torch

    return torch.softmax(torch.tensor(logits), 0)


def test_no_server_is_told(
    data: Path, base_location: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(base_location["tiny-bert"], data, tmp_path / "out", "--serve-at", "http://127.0.0.1:9")
    assert main(given) == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err
