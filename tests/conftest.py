"""Fixtures: tiny bases, the real embedded ones, the adapters handed out with the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from server.bases import resolve_base
from tests.support import save_tiny_base

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def base_location(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Base name -> directory, for all bases that the tests know."""
    folder = tmp_path_factory.mktemp("bases")
    tiny = {kind: str(save_tiny_base(kind, folder / kind)) for kind in ("tiny-llama", "tiny-bert")}
    return {**tiny, **{name: resolve_base(name).location for name in ("smollm2", "minilm")}}


@pytest.fixture(scope="session")
def real_adapters() -> Path:
    """The folder of checkpoints that were trained for real, beside the checkout."""
    folder = ROOT.parent / "shared" / "adapters"
    if not folder.is_dir():
        pytest.skip("the folder shared/adapters is not beside this checkout")
    return folder
