"""The house stands as designed: who may import whom, and what holds no tensors."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).parent.parent
ADAPTERS = [
    "errors", "patterns", "values", "config_fields", "config", "layout", "adapter", "labels", "tokenizer_files",
    "memory", "arena", "arena_map", "arena_files", "head_placement", "token_placement", "placement", "adalora",
    "checkpoint", "report", "batch", "kernels", "dora", "token_slots", "slots", "packed", "products", "layers",
    "token_layers", "heads", "version", "composition", "host_tier", "device_tier", "registry", "directory", "database",
    "version_files", "store", "catalog", "merge",
]  # fmt: skip
WITHOUT_TENSORS = [
    "server/engine/scheduler.py", "server/engine/block_manager.py", "server/engine/request.py",
    "server/engine/tasks.py", "server/engine/detokenizer.py", "server/config.py", "server/metrics.py",
    "server/caller.py", "server/key_file.py", "server/keys.py",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "server/api").glob("*.py")),
]  # fmt: skip

ENGLISH = {"bit", "encoder-decoder"}
"""Names of architectures that are words of ours too."""


def imports(file: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", files("adapters"), ids=str)
def test_the_library_knows_nothing_of_the_server(file: Path) -> None:
    packages = {name.split(".")[0] for name in imports(file)}
    assert not packages & {"server", "fastapi", "starlette", "uvicorn", "pydantic", "transformers", "tokenizers"}


@pytest.mark.parametrize("file", [f for f in files("adapters") if f.parent.name == "adapters"], ids=str)
def test_a_library_file_imports_only_what_stands_above_it(file: Path) -> None:
    if file.stem == "__init__":
        assert imports(file) <= {"__future__", "__future__.annotations"}
        return
    above = ADAPTERS[: ADAPTERS.index(file.stem)]
    inside = {name.split(".")[1] for name in imports(file) if name.startswith("adapters.")}
    assert inside <= set(above)


@pytest.mark.parametrize("file", files("server/engine"), ids=str)
def test_the_engine_knows_nothing_of_http(file: Path) -> None:
    names = imports(file)
    assert not [name for name in names if name.startswith(("server.api", "server.service", "fastapi", "starlette"))]


@pytest.mark.parametrize("file", files("server/training"), ids=str)
def test_training_knows_nothing_of_serving(file: Path) -> None:
    serving = ("server.api", "server.service", "server.engine.engine", "server.engine.async_engine", "fastapi")
    assert not [name for name in imports(file) if name.startswith(serving)]


@pytest.mark.parametrize("file", [f for f in files("server") if f.parent.name != "training"], ids=str)
def test_nothing_of_serving_needs_training(file: Path) -> None:
    of_training = {name for name in imports(file) if name.startswith("server.training")}
    allowed = {"server.training", "server.training.recipe", "server.training.cli", "server.training.cli.run_training"}
    assert of_training <= (allowed if file.name == "cli.py" else set())


@pytest.mark.parametrize("file", files("server/engine"), ids=str)
def test_the_engine_names_no_architecture(file: Path) -> None:
    """One that transformers has needs no code of ours: not even a comment speaks of it."""
    words = "|".join(re.escape(name) for name in set(CONFIG_MAPPING.keys()) - ENGLISH)
    assert not re.findall(rf"(?<![\w-])(?:{words})(?![\w-])", file.read_text(), re.IGNORECASE)
    assert not [name for name in imports(file) if re.match(r"transformers\.models\.(?!auto\b)", name)]


def test_a_caller_is_plain_and_keys_know_nothing_of_http() -> None:
    assert {name.split(".")[0] for name in imports(ROOT / "server/caller.py")} <= {
        "__future__", "dataclasses", "fnmatch", "typing", "server",
    }  # fmt: skip
    for file in ("server/key_file.py", "server/keys.py"):
        names = imports(ROOT / file)
        assert not [name for name in names if name.startswith(("server.api", "server.service", "fastapi", "starlette"))]


@pytest.mark.parametrize("file", WITHOUT_TENSORS)
def test_files_without_tensors(file: str) -> None:
    assert "torch" not in {name.split(".")[0] for name in imports(ROOT / file)}


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, server.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_serving_loads_nothing_of_training() -> None:
    """Nor what only a conversion needs: what is imported stays in a server's memory."""
    unused = {"peft", "sklearn", "seqeval", "sacrebleu", "matplotlib", "pyarrow", "gguf"}
    code = (
        "import sys, server.api.app; from transformers import LlamaForCausalLM; "
        f"print(*sorted({unused!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not loaded.stdout.split()
