"""The command line, as a person meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import server
from server.cli import main


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, expected in (("--version", server.__version__), ("--help", "serve")):
        with pytest.raises(SystemExit) as left:
            main([flag])
        assert left.value.code == 0
        assert expected in capsys.readouterr().out


def test_bad_settings_are_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--max-loras", "0"]) == 2
    assert capsys.readouterr().err == "multilora: max_loras must not be 0\n"


def test_convert_prints_where_the_base_lies(base_location: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--base", "smollm2"]) == 0
    assert capsys.readouterr().out.strip() == base_location["smollm2"]
    assert main(["convert", "--base", "./absent"]) == 2
    assert "does not exist" in capsys.readouterr().err


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_serve_tells_where_it_listens_answers_and_ends(
    base_location: dict[str, str], tiny_adapters: Path, ending: signal.Signals
) -> None:
    process = start("--base", base_location["tiny-llama"], "--adapter-dir", str(tiny_adapters))
    assert process.stderr is not None
    url, lines = "", []
    for line in process.stderr:
        lines.append(line)
        if "listening on" in line:
            url = line.split("listening on ")[1].strip()
        if " ready in " in line:
            break
    assert url.startswith("http://127.0.0.1:"), lines
    answer = httpx.post(f"{url}/v1/predict", json={"task": "sort", "inputs": "the fox"}, timeout=60)
    assert answer.status_code == 200
    process.send_signal(ending)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode in (0, -ending), rest
    assert "Traceback" not in rest


def test_a_base_that_is_not_there_ends_the_server_with_its_reason() -> None:
    process = start("--base", "./absent")
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "does not exist" in rest
