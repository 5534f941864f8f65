"""`make fuzz`: schemathesis sends what /openapi.json allows and what it forbids, and holds the answers to it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from tests.support import TINY_ADAPTERS, Live, live_server, make_adapter, service_for
from tests.tools_support import QWEN, save_tool_base

HERE = Path(__file__).parent
NAME = "tiny"
"""Of the base."""


@dataclass
class Answers:
    """To the requests to one route."""

    valid: Counter[int] = field(default_factory=Counter)
    """Status -> how many, where the description allows the request."""
    invalid: Counter[int] = field(default_factory=Counter)

    @property
    def served(self) -> float:
        """Share of the valid requests that had success."""
        return sum(count for status, count in self.valid.items() if status < 300) / max(self.valid.total(), 1)


@dataclass
class Findings:
    """What one run showed."""

    status: int
    """schemathesis' exit status: 0 when no check failed."""
    output: str
    cases: int
    routes: dict[str, Answers]

    def table(self) -> str:
        rows = [f"{'route':36} valid  served  of them, the rest of the answers, to invalid ones"]
        for route, answers in sorted(self.routes.items()):
            rest = {status: count for status, count in sorted(answers.valid.items()) if status >= 300}
            told = f"{rest or ''} / {dict(sorted(answers.invalid.items())) or ''}"
            rows.append(f"{route:36} {answers.valid.total():5}  {answers.served:6.0%}  {told}")
        return "\n".join(rows)


def fuzz(live: Live, folder: Path, examples: int, seed: int | None = None) -> Findings:
    """Test `live`, which has the tiny adapters and may load them; `examples`: cases for each route in the phase of
    random ones. Without a seed every run sends the same. Works in the empty `folder`.
    """
    shutil.copy(HERE / "schemathesis.toml", folder)
    digests = [_put(live, "versioned", source) for source in ("chat-b", "chat-a")]
    (folder / "digests.dict").write_text("".join(f'"{digest}"\n"{digest[:8]}"\n' for digest in digests))
    report = folder / "report.ndjson"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml"), "run",
        f"{live.url}/openapi.json", "--checks", "all", "--max-examples", str(examples), "--continue-on-failure",
        "--no-color", "--report", "ndjson", "--report-ndjson-path", str(report),
        *(["--generation-deterministic"] if seed is None else ["--seed", str(seed)]),
    ]  # fmt: skip
    root = str(live.service.config.root)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "FUZZ_ADAPTER_ROOT": root}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return Findings(done.returncode, done.stdout + done.stderr, *_answers(report))


def _put(live: Live, name: str, source: str) -> str:
    answer = httpx.put(f"{live.url}/v1/adapters/{name}", json={"source": source}, timeout=60)
    return str(answer.raise_for_status().json()["digest"])


def _answers(report: Path) -> tuple[int, dict[str, Answers]]:
    """How many cases, and the answers of each route but those to methods that it has not."""
    routes: defaultdict[str, Answers] = defaultdict(Answers)
    cases = 0
    for line in report.read_text().splitlines() if report.exists() else ():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for key, exchange in recorder.get("interactions", {}).items():
            cases += 1
            case, response = recorder["cases"][key]["value"], exchange["response"]
            if response is None or response["status_code"] == 405:
                continue
            answers = routes[f"{case['method']} {case['path']}"]
            valid = case["meta"]["generation"]["mode"] == "positive"
            (answers.valid if valid else answers.invalid)[response["status_code"]] += 1
    return cases, dict(routes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=150, help="random cases for each route")
    parser.add_argument("--seed", type=int, help="of the random cases; without one every run sends the same")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        base = save_tool_base(folder / "base", QWEN, tags=False)
        for spec in TINY_ADAPTERS:
            make_adapter(base, folder / "root", spec)
        shutil.copytree(folder / "root", folder / "adapters")
        (folder / "run").mkdir()
        service = service_for(
            base, NAME, adapter_dir=str(folder / "adapters"), adapter_root=str(folder / "root"), max_model_len=1024
        )
        with live_server(service) as live:
            found = fuzz(live, folder / "run", options.examples, options.seed)
    if found.status:
        print(found.output)
    print(found.table())
    print(f"{found.cases} cases, {'see the findings above' if found.status else 'no finding'}")
    return found.status


if __name__ == "__main__":
    sys.exit(main())
