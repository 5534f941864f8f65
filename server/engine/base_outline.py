"""BaseOutline: what is known of a base before its weights are loaded, enough to judge a checkpoint made for it.

Knows nothing of adapters. Whether the base itself passes its self-test is not known without its weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from adapters.layout import BaseLayout, TokenLayer
from adapters.values import digest_of
from server.engine.base_model import body_layout, model_class, read_config, saved_dtype
from server.engine.task_heads import find_task_heads, with_heads


@dataclass(frozen=True)
class BaseOutline:
    """Of one base."""

    layout: BaseLayout
    saved_dtype: torch.dtype | None


def read_outline(location: str) -> BaseOutline:
    """From the config at `location`, a directory or a hub id: the model is built without memory for its weights.

    Of the weights' files only the names of tensors are read, where they are on this machine and safetensors; else it is
    taken for granted that a pooler that the config promises was saved. Embedding and language-model head are read when
    a checkpoint is to be compared with them. Raises UnsupportedBase. Any thread.
    """
    config = read_config(location)
    with torch.device("meta"):
        model = model_class(config).from_config(config, attn_implementation="eager").eval()
    names = _saved_names(location)
    body = model.base_model
    if names and getattr(body, "pooler", None) is not None and not any("pooler" in name for name in names):
        body.pooler = None
    layout = _with_saved_layers(body_layout(model), location)
    if not layout.generates:
        layout = with_heads(layout, *find_task_heads(config), _has_plain_pooler(body))
    return BaseOutline(layout, saved_dtype(config))


def _with_saved_layers(layout: BaseLayout, location: str) -> BaseLayout:
    """`layout`, its embedding and its head known by the files at `location`."""

    def known(layer: TokenLayer, *others: TokenLayer) -> TokenLayer:
        names = [f"{name}.weight" for each in (layer, *others) for name in each.names(layout.prefix)]
        return replace(layer, digest=cache(lambda: _saved_digest(location, names)))

    embedding, output = layout.embedding, layout.output
    if output is not None:
        layout = replace(layout, output=known(output, *([embedding] if embedding and layout.tied else [])))
    return layout if embedding is None else replace(layout, embedding=known(embedding))


def _saved_digest(location: str, names: Sequence[str]) -> str | None:
    """Of the first of these tensors that was saved, where it is here and safetensors."""
    whole, index = _file_here(location, SAFE_WEIGHTS_NAME), _file_here(location, SAFE_WEIGHTS_INDEX_NAME)
    files = dict.fromkeys(names, whole)
    if whole is None and index is not None:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        files = {name: _file_here(location, weight_map[name]) for name in names if name in weight_map}
    for name, file in files.items():
        if file is not None:
            with safe_open(file, "pt") as weights:
                if name in weights.keys():  # noqa: SIM118  -- it is no mapping
                    return digest_of(weights.get_tensor(name))
    return None


def _saved_names(location: str) -> list[str]:
    """Of the base's tensors; none where its files are not here, or no safetensors."""
    if whole := _file_here(location, SAFE_WEIGHTS_NAME):
        with safe_open(whole, "pt") as weights:
            return list(weights.keys())
    if index := _file_here(location, SAFE_WEIGHTS_INDEX_NAME):
        return list(json.loads(Path(index).read_text())["weight_map"])
    return []


def _file_here(location: str, file: str) -> str | None:
    """Where a base's file lies on this machine."""
    try:
        return cached_file(location, file, local_files_only=True)
    except OSError:
        return None


@torch.inference_mode()
def _has_plain_pooler(body: nn.Module) -> bool:
    """Whether what the base calls its pooled output is what comes out of its module `pooler`, of its hidden states."""
    pooler = getattr(body, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return False
    calls: list[tuple[Any, Tensor]] = []
    hook = pooler.register_forward_hook(lambda _module, arguments, output: calls.append((arguments[0], output)))
    try:
        output = body(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    except (RuntimeError, TypeError, AttributeError, IndexError):  # as self_test.check_pooler, with the weights, has it
        return False
    finally:
        hook.remove()
    return any(x is output.last_hidden_state and y is output.pooler_output for x, y in calls)
