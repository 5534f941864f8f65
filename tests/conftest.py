"""Fixtures: tiny bases, the real embedded ones, the adapters handed out with the project."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from adapters.kernels.library import Library, usable_targets
from server.bases import resolve_base
from tests.native_support import library_of
from tests.support import TINY_ADAPTERS, Live, live_server, make_adapter, save_tiny_base, service_for

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def base_location(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Base name -> directory, for all bases that the tests know."""
    folder = tmp_path_factory.mktemp("bases")
    tiny = {kind: str(save_tiny_base(kind, folder / kind)) for kind in ("tiny-llama", "tiny-bert")}
    return {**tiny, **{name: resolve_base(name).location for name in ("smollm2", "minilm")}}


@pytest.fixture(params=usable_targets())
def library(request: pytest.FixtureRequest) -> Library:
    """Each object of the CPU kernels that this processor runs."""
    return library_of(request.param)


@pytest.fixture(scope="session")
def real_adapters() -> Path:
    """The folder of checkpoints that were trained for real, beside the checkout."""
    folder = ROOT.parent / "shared" / "adapters"
    if not folder.is_dir():
        pytest.skip("the folder shared/adapters is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_adapters(base_location: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of each kind (two that chat) for the tiny Llama. Copy before changing anything."""
    folder = tmp_path_factory.mktemp("adapters")
    for spec in TINY_ADAPTERS:
        make_adapter(base_location["tiny-llama"], folder, spec)
    return folder


@pytest.fixture(scope="session")
def live(base_location: dict[str, str], tiny_adapters: Path) -> Iterator[Live]:
    """A server on a real socket: the tiny Llama with the tiny adapters. Leave it as it is."""
    service = service_for(base_location["tiny-llama"], "tiny", adapter_dir=str(tiny_adapters))
    with live_server(service) as running:
        yield running


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """The official client of `live`."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as made:
        yield made
