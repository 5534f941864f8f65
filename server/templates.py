"""TemplateProcess: renders the chat templates that adapters bring, in a process apart, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

PROGRAM = Path(__file__).with_name("template_process.py")
TIMEOUT_S = 2.0
"""Of one rendering."""
START_TIMEOUT_S = 60.0
"""Of the first one, which waits for the process, too."""


NOTHING: dict[str, Any] = {"template": "", "messages": [], "tools": None, "options": {}}


class TemplateLimit(TemplateError):
    """A template took more time or memory than one may."""


class TemplateProcess:
    """Started at the first rendering, and again after one that was ended. Any thread; one rendering at a time."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        template: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        options: dict[str, Any],
    ) -> str:
        """As transformers renders it. Raises TemplateSyntaxError, TemplateLimit; TemplateError where it refuses.

        options: what the template finds beside messages and tools.
        """
        request = {"template": template, "messages": list(messages), "tools": list(tools) or None, "options": options}
        with self._lock:
            if self._process is None:
                self._process = self._start()
                self._ask(self._process, NOTHING, START_TIMEOUT_S)
            answer = self._ask(self._process, request, self._timeout_s)
        if answer.get("kind") == "syntax":
            raise TemplateSyntaxError(answer["error"], 1)
        if answer.get("kind") == "limit":
            raise TemplateLimit(answer["error"])
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        weakref.finalize(self, _end, process)
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, Any], timeout_s: float) -> dict[str, str]:
        """One line out, one in. A process that does not answer in time is ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(timeout_s, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            watch.cancel()
        if not line:
            self._process = None
            _end(process)
            raise TemplateLimit(f"it takes more than {timeout_s:g} seconds, or too much memory")
        answer: dict[str, str] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
