"""TokenPlacement: the tensors of a checkpoint that stand for the base's embedding and language-model head.

PEFT writes such a layer whole where `modules_to_save` names it, where LoRA is on it, and where the vocabulary was
resized; and single rows of it for `trainable_token_indices`. What it loads into the base itself, it loads into both
layers of a base that ties them; what stands in modules_to_save is that layer's alone. Source: peft/utils/other.py
(set_additional_trainable_modules), peft/utils/save_and_load.py, peft/tuners/trainable_tokens. Knows nothing of files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import OwnTokens, TokenRows
from adapters.config import INPUT_EMBEDDING, LoraConfig
from adapters.head_placement import ROOT, UNUSED
from adapters.layout import GENERATING, BaseLayout, TokenLayer
from adapters.patterns import covers, ends_in
from adapters.values import digest_of, widened

WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.(?P<form>base_layer|original_module|token_adapter\.base_layer|modules_to_save(?:\.default)?))?"
    r"\.(?P<part>weight|bias)"
)
TIED_NAME = "embed_tokens"
"""The only embedding that `ensure_weight_tying` concerns (peft/utils/constants.py, EMBEDDING_LAYER_NAMES)."""
ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")


class TokenPlacement:
    """Collects what an adapter has of both layers."""

    def __init__(self, config: LoraConfig, layout: BaseLayout, task_type: str) -> None:
        self.config = config
        self.reasons: list[str] = []
        self._prefix = layout.prefix
        self._layers: dict[str, TokenLayer] = {}
        if layout.embedding is not None:
            self._layers["embedding"] = layout.embedding
        if layout.output is not None and task_type in GENERATING:
            self._layers["output"] = layout.output
        self._generates = layout.generates and task_type in GENERATING
        self._tied = layout.tied and len(self._layers) == 2
        self._own: dict[str, list[Tensor]] = defaultdict(list)
        """Of modules_to_save, by layer."""
        self._replaced: dict[str, list[Tensor]] = defaultdict(list)
        """What PEFT would load into the base, by layer."""
        self._biases: list[Tensor] = []
        self._rows: dict[str, Tensor] = {}

    @property
    def layers(self) -> Mapping[str, TokenLayer]:
        """`embedding` and `output`, as far as the base and the task's model have them."""
        return self._layers

    @property
    def names(self) -> list[str]:
        """As a checkpoint may call them."""
        return [name for layer in self._layers.values() for name in layer.names(self._prefix)]

    def take(self, key: str, tensor: Tensor) -> str | None:
        """Where the checkpoint's tensor `key` went; None when it is none of these."""
        name = key.removeprefix(ROOT)
        if (match := ROWS.fullmatch(name)) and (layer := self._layer_of(match["module"])):
            if layer in self._rows:
                self.reasons.append(f"{match['module']!r} has its tokens' rows twice")
            self._rows[layer] = tensor
            return f"rows of tokens of {match['module']}"
        match = WHOLE.fullmatch(name)
        layer = self._layer_of(match["module"]) if match else None
        if match is None or layer is None:
            return None
        module, form, part = match["module"], match["form"] or "", match["part"]
        saved = form.startswith("modules_to_save") or (not form and self._is_saved(module))
        if part == "bias":
            if not saved and self.config.bias != "none":
                return None  # it is that of its LoRA
            if form == "original_module":
                return UNUSED
            self._biases.append(tensor)
        else:
            (self._own if saved else self._replaced)[layer].append(tensor)
        return f"{part} of its own {module}"

    def make(self) -> OwnTokens | None:
        """All of it, where there is anything; what does not fit is in `reasons`."""
        self._check_names()
        wholes = {layer: self._whole(layer) for layer in self._layers}
        embedding, output = wholes.get("embedding"), wholes.get("output")
        bias = self._bias(output)
        self._check_sizes(embedding, output)
        rows = self._make_rows(embedding, output)
        if embedding is None and output is None and not rows:
            return None
        return OwnTokens(embedding, rows.get("embedding"), output, bias, rows.get("output"))

    def size(self, tokens: OwnTokens | None) -> int:
        """How many tokens the adapter knows; 0: those of the base."""
        embedding = None if tokens is None else tokens.embedding
        layer = self._layers.get("embedding")
        return 0 if embedding is None or layer is None or len(embedding) == layer.shape.d_in else len(embedding)

    def _layer_of(self, module: str) -> str | None:
        return next((kind for kind, layer in self._layers.items() if module in layer.names(self._prefix)), None)

    def _is_saved(self, module: str) -> bool:
        return any(covers(saved, module) for saved in self.config.modules_to_save)

    def _whole(self, kind: str) -> Tensor | None:
        """The weights of one layer: its own, or what would be loaded into the base."""
        replaced = [t for k in (self._layers if self._tied else (kind,)) for t in self._replaced[k]]
        own, name = self._own[kind], self._layers[kind].name
        for given in (own, replaced):
            if not _all_equal(given):
                self.reasons.append(f"{name!r} has weights of its own twice, and they differ")
        found = [*own, *replaced]
        if not found:
            return None
        shape = self._layers[kind].shape
        width = shape.d_out if kind == "embedding" else shape.d_in
        if found[0].ndim != 2 or found[0].shape[1] != width or not len(found[0]):
            self.reasons.append(f"{name!r} has shape {tuple(found[0].shape)}, this base needs (tokens, {width})")
            return None
        return None if self._is_the_bases(found[0], kind) else found[0]

    def _is_the_bases(self, weight: Tensor, kind: str) -> bool:
        """PEFT saves a layer with LoRA on it whole, though it did not change."""
        layer = self._layers[kind]
        size = layer.shape.d_in if kind == "embedding" else layer.shape.d_out
        if len(weight) != size or (kind == "output" and self._biases):
            return False
        known = layer.digest()
        return known is not None and digest_of(weight) == known

    def _bias(self, output: Tensor | None) -> Tensor | None:
        if not self._biases:
            return None
        name = self._layers["output"].name if "output" in self._layers else self._layers["embedding"].name
        if output is None or not self._layers["output"].shape.has_bias:
            self.reasons.append(f"{name!r} has a bias, but not in this base, or no weights with it")
        elif not _all_equal(self._biases) or tuple(self._biases[0].shape) != (len(output),):
            self.reasons.append(f"the bias of {name!r} occurs twice or has another shape than ({len(output)},)")
        return self._biases[0]

    def _check_names(self) -> None:
        """What the config names must be there."""
        for kind, layer in self._layers.items():
            if any(self._is_saved(name) for name in layer.names(self._prefix)) and not self._own[kind]:
                self.reasons.append(f"modules_to_save names {layer.name!r}, for which there are no weights")
        if self.config.ensure_weight_tying and self._tied and self._own["embedding"]:
            heads = [*self._own["output"], *self._replaced["output"]]
            if not _all_equal([*self._own["embedding"], *heads]):
                self.reasons.append("ensure_weight_tying, but embedding and language-model head have other weights")
            elif not heads and ends_in(self._layers["embedding"].name, [TIED_NAME]):
                self.reasons.append("ensure_weight_tying, but the language-model head has no weights of its own")

    def _check_sizes(self, embedding: Tensor | None, output: Tensor | None) -> None:
        """An output head has a logit for each token of the embedding."""
        if len(self._layers) < 2:
            self._check_size_of_one(embedding, output)
            return
        base = self._layers["embedding"].shape.d_in, self._layers["output"].shape.d_out
        mine = base[0] if embedding is None else len(embedding), base[1] if output is None else len(output)
        if mine != base and mine[0] != mine[1]:
            self.reasons.append(f"its embedding has {mine[0]} tokens, its language-model head {mine[1]}")

    def _check_size_of_one(self, embedding: Tensor | None, output: Tensor | None) -> None:
        """Of a base that generates, but has only one of both where adapters can change it."""
        for kind, layer in self._layers.items() if self._generates else ():
            whole = embedding if kind == "embedding" else output
            size = layer.shape.d_in if kind == "embedding" else layer.shape.d_out
            if whole is not None and len(whole) != size:
                self.reasons.append(f"{layer.name!r} has {len(whole)} tokens, on this base adapters must have {size}")

    def _make_rows(self, embedding: Tensor | None, output: Tensor | None) -> dict[str, TokenRows]:
        indices = self._indices()
        shared = self._tied and (len(indices) < 2 or indices["embedding"] == indices["output"])
        if self.config.ensure_weight_tying and self._tied and not shared:
            self.reasons.append("ensure_weight_tying, but trainable_token_indices differ between the tied layers")
        if shared and "embedding" in indices and self._own["output"]:
            self.reasons.append("trainable_token_indices does not go with a tied head in modules_to_save")
        rows = {}
        for kind, ids in indices.items():
            layer = self._layers[kind]
            given = self._rows.get(kind)
            if given is None and not (shared and kind == "output" and "embedding" in indices):
                self.reasons.append(f"trainable_token_indices names {layer.name!r}, for which there are no rows")
            elif given is not None:
                rows[kind] = self._sorted(layer, kind, ids, given, embedding if kind == "embedding" else output)
        for kind in self._rows.keys() - indices.keys():
            if kind == "output" and shared and "embedding" in rows and _all_equal([*self._rows.values()]):
                continue  # a resized model is saved with both
            self.reasons.append(f"{self._layers[kind].name!r} has tokens' rows, which trainable_token_indices lacks")
        if shared and "embedding" in rows:
            rows["output"] = rows["embedding"]
        if "output" in rows and self._layers["output"].shape.has_bias:
            self.reasons.append("trainable_token_indices on a language-model head with a bias, which PEFT drops")
        return {kind: each for kind, each in rows.items() if each.ids}

    def _indices(self) -> dict[str, tuple[int, ...]]:
        """Of the config, by layer. A layer that is named twice, or that the base does not have, is a reason."""
        found: dict[str, tuple[int, ...]] = {}
        for name, ids in self.config.token_indices.items():
            kinds = [
                kind
                for kind, layer in self._layers.items()
                if (kind == "embedding" if name == INPUT_EMBEDDING else ends_in(layer.names(self._prefix)[1], [name]))
            ]
            if not kinds or kinds[0] in found:
                shown = name or "the input embedding"
                self.reasons.append(f"trainable_token_indices: {shown!r} is no embedding of this base, or named twice")
            elif any(self._is_saved(each) for each in self._layers[kinds[0]].names(self._prefix)):
                self.reasons.append(f"{name!r} is in both modules_to_save and trainable_token_indices")
            else:
                found[kinds[0]] = ids
        return found

    def _sorted(
        self, layer: TokenLayer, kind: str, ids: Iterable[int], rows: Tensor, whole: Tensor | None
    ) -> TokenRows:
        shape = layer.shape
        ids = tuple(ids)
        size = len(whole) if whole is not None else shape.d_in if kind == "embedding" else shape.d_out
        expected = (len(ids), shape.d_out if kind == "embedding" else shape.d_in)
        if tuple(rows.shape) != expected:
            self.reasons.append(f"the tokens' rows of {layer.name!r} have shape {tuple(rows.shape)}, not {expected}")
            return TokenRows((), rows)
        if ids and max(ids) >= size:
            self.reasons.append(f"trainable_token_indices has token {max(ids)}, {layer.name!r} has {size}")
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        return TokenRows(tuple(ids[i] for i in order), torch.from_numpy(widened(rows)[order]))


def _all_equal(tensors: list[Tensor]) -> bool:
    return all(np.array_equal(widened(tensors[0]), widened(other)) for other in tensors[1:])
