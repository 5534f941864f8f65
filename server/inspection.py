"""`multilora inspect`: what a checkpoint would be to a base, or every reason why it is not served.

Loads no weights of the base, and starts no engine: whether the base itself can be served is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters.adapter import AdapterInfo
from adapters.checkpoint import read_checkpoint
from adapters.errors import InvalidAdapter
from adapters.report import Report, describe
from server.bases import load_tokenizer, resolve_base
from server.config import ServerConfig
from server.engine.base_model import UnsupportedBase
from server.engine.base_outline import read_outline
from server.engine.device import choose_device, choose_dtype
from server.engine.engine import adapter_limits
from server.own_tokenizers import ExaminedTokenizers


@dataclass(frozen=True)
class Inspection:
    """One checkpoint, and one base by its name."""

    path: Path
    base: str
    info: AdapterInfo | None
    report: Report | None
    """None: it is refused."""
    reasons: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """With the names that `GET /v1/adapters/{name}` has."""
        told: dict[str, Any] = {"name": self.path.resolve().name, "base": self.base}
        if self.info is None or self.report is None:
            return {**told, "state": "refused", "reasons": list(self.reasons)}
        info = self.info
        return {
            **told, "state": "ready", "task_type": info.task_type, "digest": info.digest, "rank": info.rank,
            "bytes": info.num_bytes, "labels": list(info.labels), **asdict(self.report),
        }  # fmt: skip

    def as_text(self) -> str:
        """For a person."""
        return "\n".join(_refusal(self.as_json()) if self.report is None else _description(self.as_json()))


def inspect(path: Path, config: ServerConfig) -> Inspection:
    """The checkpoint in `path` for `config.base`, under its limits.

    Raises BaseNotFound, DeviceNotAvailable, OSError.
    """
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else None
    source = resolve_base(config.base, cache)
    device = choose_device(config.device)
    try:
        outline = read_outline(source.location)
        limits = adapter_limits(config, device, choose_dtype(config.dtype, device, outline.saved_dtype))
        examine = ExaminedTokenizers(load_tokenizer(source.location))
        limits = replace(limits, examine_tokenizer=examine)
        adapter = read_checkpoint(path, outline.layout, replace(limits, pinned=False), max_reasons=None)
    except InvalidAdapter as error:
        return Inspection(path, source.name, None, None, error.reasons)
    except UnsupportedBase as error:
        return Inspection(path, source.name, None, None, (str(error),))
    return Inspection(path, source.name, adapter.info, describe(adapter, limits))


def _refusal(told: Mapping[str, Any]) -> list[str]:
    return [f"{told['name']} is refused on {told['base']}:", *(f"  {reason}" for reason in told["reasons"])]


def _description(told: Mapping[str, Any]) -> list[str]:
    facts = {
        "digest": told["digest"],
        "labels": f"{', '.join(told['labels'])} ({told['problem_type']})" if told["labels"] else "none",
        "checkpoint": f"{told['bytes']:,} bytes",
        "host memory": f"{told['host_bytes']:,} bytes",
        "slot": f"{told['slot_bytes']:,} bytes of the device's memory",
        "largest rank": str(told["rank"]),
    }
    modules = {name: f"rank {each['rank']}, scaling {each['scaling']:g}" for name, each in told["modules"].items()}
    return [
        f"{told['name']} is served on {told['base']} as {told['task_type']}",
        *_aligned(facts),
        f"{len(modules)} layers of the base:",
        *_aligned(modules),
        f"{len(told['coverage'])} tensors:",
        *_aligned(told["coverage"]),
    ]


def _aligned(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {name:{width}}  {value}" for name, value in rows.items()]
