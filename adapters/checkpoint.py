"""Read a PEFT checkpoint directory, refuse what cannot be served exactly, and give it a digest.

Knows nothing of slots, devices or requests. safetensors only: no pickle is ever opened. The whole file is read at
once, so that what was validated and hashed is what is served, whatever happens to the file later.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from adapters import adalora
from adapters.adapter import Adapter, AdapterInfo, Head, Limits, largest_rank
from adapters.arena import POOL_DTYPES, Rest, build_arena
from adapters.config import parse_config
from adapters.errors import InvalidAdapter, shortened
from adapters.labels import PROBLEM_TYPES, parse_labels
from adapters.layout import BaseLayout
from adapters.placement import Placement
from adapters.tokenizer_files import read_tokenizer_files, tokenizer_digest
from adapters.values import bad_values

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
LABELS_FILE = "labels.json"
MODEL_CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 1 << 20
MAX_REASONS = 20
T = TypeVar("T")


def read_checkpoint(
    directory: Path,
    layout: BaseLayout,
    limits: Limits,
    known: AdapterInfo | None = None,
    max_reasons: int | None = MAX_REASONS,
) -> Adapter:
    """Read the PEFT checkpoint in `directory` for the base described by `layout`.

    known: what an earlier reading of the same files gave, where the caller knows that nobody changed them since: the
    weights are neither hashed nor searched for NaN again. Raises InvalidAdapter with every reason that was found, or
    with the first `max_reasons` and how many more there are. Any thread; runs no parallel torch operation.
    """
    started = time.monotonic()
    reasons: list[str] = []

    def attempt(step: Callable[..., T], *arguments: Any) -> T | None:
        """Go on after a fault, to find the others too."""
        try:
            return step(*arguments)
        except InvalidAdapter as error:
            reasons.extend(error.reasons)
            return None

    raw_config: Any = attempt(_read_json, directory, CONFIG_FILE)
    found = attempt(_read_labels, directory, limits)
    content = attempt(_read, directory, WEIGHTS_FILE, limits.max_adapter_bytes)
    if known is not None and content is not None and len(content) != known.num_bytes:
        known = None  # somebody did change them: the digest will tell
    tokenizer_files = {} if known is not None else attempt(read_tokenizer_files, directory)
    tensors = None if content is None else attempt(_load_tensors, content)
    bad = [] if tensors is None or known is not None else bad_values(tensors)
    reasons += bad
    described, lora = attempt(_as_lora, raw_config, tensors, bool(bad)) or (None, None)
    config = None if described is None else attempt(parse_config, described)
    if config is None or found is None or content is None or tensors is None or lora is None or tokenizer_files is None:
        raise InvalidAdapter(_shorten(reasons, max_reasons))
    labels, problem_type = found
    task_type = config.task_type or layout.tasks[0]
    if task_type not in layout.tasks:
        reasons.append(f"task_type {task_type!r} is none of this base's: {', '.join(layout.tasks)}")
    placement = Placement(config, layout, limits)
    head = attempt(placement.place, lora, task_type)
    reasons += placement.reasons
    if head is not None:
        labels = _fit_labels(labels, head, reasons)
    tokenizer = known.tokenizer if known is not None else attempt(_tokenizer, tokenizer_files, placement, limits)
    if reasons or tokenizer is None:
        raise InvalidAdapter(_shorten(reasons, max_reasons))
    digest = known.digest if known is not None else _digest(raw_config, content, labels, problem_type, tokenizer)
    rest = Rest(head, placement.biases, placement.tokens)
    dtype = POOL_DTYPES[limits.lora_dtype]
    arena = build_arena(placement.pairs, dtype, rest, limits.pinned, limits.matrix_dtype)
    return Adapter(
        info=AdapterInfo(
            digest=digest,
            task_type=task_type,
            rank=largest_rank(arena.pairs),
            labels=labels,
            problem_type=problem_type or (PROBLEM_TYPES[2] if len(labels) == 1 else PROBLEM_TYPES[0]),
            num_bytes=len(content),
            vocabulary_size=placement.vocabulary_size,
            tokenizer=tokenizer,
        ),
        config=config,
        pairs=arena.pairs,
        memory=arena.memory,
        head=arena.head,
        biases=arena.biases,
        tokens=arena.tokens,
        coverage={**placement.coverage, **dict.fromkeys(tensors.keys() - lora.keys(), adalora.FOLDED)},
        loaded_in_s=time.monotonic() - started,
    )


def _as_lora(config: Any, tensors: dict[str, Tensor] | None, bad: bool) -> tuple[Any, dict[str, Tensor] | None]:
    """Config and tensors of the LoRA that a checkpoint is, or amounts to. bad: its values cannot be computed with.

    Raises InvalidAdapter.
    """
    if not isinstance(config, dict) or config.get("peft_type") != adalora.METHOD:
        return config, tensors
    return (None, None) if tensors is None or bad else adalora.fold(config, tensors)


def _read_labels(directory: Path, limits: Limits) -> tuple[tuple[str, ...], str | None]:
    """From labels.json, else from a transformers config.json beside the adapter, else none."""
    if (directory / LABELS_FILE).is_file():
        data = _read_json(directory, LABELS_FILE)
        if isinstance(data, dict) and not data.keys() & {"labels", "id2label", "problem_type"}:
            raise InvalidAdapter([f"{LABELS_FILE} has neither labels nor id2label"])
        return parse_labels(LABELS_FILE, data, limits.max_labels)
    if (directory / MODEL_CONFIG_FILE).is_file():
        return parse_labels(MODEL_CONFIG_FILE, _read_json(directory, MODEL_CONFIG_FILE), limits.max_labels)
    return (), None


def _fit_labels(labels: tuple[str, ...], head: Head, reasons: list[str]) -> tuple[str, ...]:
    if not labels:
        return tuple(f"LABEL_{i}" for i in range(len(head.weight)))
    if len(labels) != len(head.weight):
        reasons.append(f"there are {len(labels)} labels but the head has {len(head.weight)} outputs")
    return labels


def _read(directory: Path, file: str, limit: int) -> bytes:
    try:
        with (directory / file).open("rb") as handle:
            content = handle.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        found = [p.name for p in directory.glob("*.bin")] + [p.name for p in directory.glob("*.pt")]
        hint = f"; {found[0]} is a pickle, which is never read: save as safetensors" if found else ""
        if (directory / INDEX_FILE).is_file():
            hint = f"; it lies in several files ({INDEX_FILE}), which PEFT neither writes nor reads: save it as one"
        raise InvalidAdapter([f"{file} is missing{hint if file == WEIGHTS_FILE else ''}"]) from None
    except OSError as error:
        raise InvalidAdapter([f"{file} cannot be read: {error.strerror}"]) from error
    if len(content) > limit:
        raise InvalidAdapter([f"{file} is larger than the limit of {limit} bytes"])
    return content


def _read_json(directory: Path, file: str) -> Any:
    try:
        return json.loads(_read(directory, file, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter([f"{file} is not JSON: {error}"]) from error


def _load_tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise InvalidAdapter([f"{WEIGHTS_FILE} is broken: {first_line}"]) from error


def _tokenizer(files: Mapping[str, bytes], placement: Placement, limits: Limits) -> str:
    """The digest of a tokenizer that is another than the base's, else nothing. Raises InvalidAdapter."""
    own, embedding = placement.vocabulary_size, placement.layout.embedding
    size = own or (0 if embedding is None else embedding.shape.d_in)
    if (files or own) and limits.examine_tokenizer is not None and not limits.examine_tokenizer(files, size, own > 0):
        return ""
    return tokenizer_digest(files)


def _digest(config: Any, weights: bytes, labels: Iterable[str], problem_type: str | None, tokenizer: str) -> str:
    """sha256 over config, labels, tokenizer and weights, each with its length before it; hexadecimal."""
    told = {"config": config, "labels": [*labels], "problem_type": problem_type}
    described = json.dumps({**told, "tokenizer": tokenizer} if tokenizer else told, sort_keys=True)
    result = hashlib.sha256()
    for part in (described.encode(), weights):
        result.update(len(part).to_bytes(8, "little"))
        result.update(part)
    return result.hexdigest()


def _shorten(reasons: list[str], count: int | None) -> list[str]:
    shown = [shortened(reason) for reason in reasons[:count]]
    rest = len(reasons) - len(shown)
    return [*shown, f"and {rest} more reasons"] if rest > 0 else shown
