"""The command line, as a person meets it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import server
from adapters.kernels.library import openmp_files
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


@pytest.mark.skipif(not openmp_files(), reason="torch has another OpenMP here")
@pytest.mark.parametrize(
    ("given", "turns"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "50"}, "50"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_wait_for_so_many_turns_before_they_sleep(given: dict[str, str], turns: str) -> None:
    """As OpenMP itself tells."""
    ours = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-m", "server", "convert", "--base", "smollm2"]
    done = subprocess.run(
        command, env={**environment, **given, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def wait_ready(process: subprocess.Popen[str]) -> str:
    """Where it listens."""
    assert process.stderr is not None
    url, lines = "", []
    for line in process.stderr:
        lines.append(line)
        if "listening on" in line:
            url = line.split("listening on ")[1].strip()
        if " ready in " in line:
            break
    assert url.startswith("http://127.0.0.1:"), lines
    while httpx.get(f"{url}/ready").status_code != 200:
        pass
    return url


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_serve_tells_where_it_listens_answers_and_ends(
    base_location: dict[str, str], tiny_adapters: Path, ending: signal.Signals
) -> None:
    process = start("--base", base_location["tiny-llama"], "--adapter-dir", str(tiny_adapters))
    url = wait_ready(process)
    answer = httpx.post(f"{url}/v1/predict", json={"task": "sort", "inputs": "the fox"}, timeout=60)
    assert answer.status_code == 200
    process.send_signal(ending)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


def test_a_stop_refuses_new_requests_and_lets_running_ones_finish(base_location: dict[str, str]) -> None:
    process = start("--base", base_location["tiny-llama"])
    url = wait_ready(process)
    body = {"model": "tiny-llama", "prompt": [5, 6], "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 8}
    with (
        httpx.Client(base_url=url, timeout=60) as other,
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while (ready := other.get("/ready")).status_code == 200:
            pass
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
        refused = other.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        assert other.get("/health").status_code == 200
        received = [line for line in lines if line]
    assert received[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in received) == 8
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0, rest
    assert "cut off" not in rest


def test_what_does_not_finish_in_time_is_cut_off(base_location: dict[str, str]) -> None:
    process = start("--base", base_location["tiny-llama"], "--drain-timeout", "1")
    address = wait_ready(process).removeprefix("http://")
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 60) as endless:
        endless.sendall(f"POST /v1/predict HTTP/1.1\r\nhost: {address}\r\ncontent-length: 100\r\n\r\n{{".encode())
        assert httpx.get(f"http://{address}/health").status_code == 200  # what came before it has been read
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
        answer = endless.recv(65536).decode()
    assert process.returncode == 0, rest
    assert answer.startswith("HTTP/1.1 503 ")
    assert '"code":"draining"' in answer
    assert "Traceback" not in rest
    assert "1 requests were not done in time and are cut off" in rest


def test_a_base_that_is_not_there_ends_the_server_with_its_reason() -> None:
    process = start("--base", "./absent")
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "does not exist" in rest
