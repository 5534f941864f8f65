"""FEATURE_EXTRACTION: pairs (`anchor`, `positive`) that shall lie near each other, all others of a batch far away.

The loss is that of "Efficient Natural Language Response Suggestion for Smart Reply" (Henderson et al., 2017),
sentence-transformers' MultipleNegativesRankingLoss; a row's own `negative` is one more that shall lie far away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedTokenizerBase

from server.engine.tasks import FeatureExtraction
from server.training.data import Row, convert_rows, read_rows
from server.training.examples import Evaluation, Example, Ids, by_length, padded, prepared

SCALE = 20.0
"""Of the cosines, before the softmax."""


class TextEmbedding:
    """Vectors by the base's own pooling, of length 1."""

    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    metrics: tuple[str, ...] = ("mrr", "recall_at_1")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pooling: str) -> None:
        """pooling: mean, cls or last."""
        self.tokenizer = tokenizer
        self.pooling = pooling
        self._prepare = FeatureExtraction(tokenizer).prepare

    def read(self, path: Path) -> list[Example]:
        return convert_rows(path, read_rows(path), self._example)

    def _example(self, row: Row) -> Example:
        """others: the positive, and the negative, if there is one."""
        anchor, positive = row.text("anchor"), row.text("positive")
        texts = [positive, row.text("negative")] if row.has("negative") else [positive]
        return Example(anchor, self._ids(anchor), None, positive, anchor, tuple(map(self._ids, texts)))

    def _ids(self, text: str) -> Ids:
        return tuple(prepared(self._prepare, text).token_ids)

    def load(self, location: str, dtype: torch.dtype) -> Any:
        model: Any = AutoModel.from_pretrained(location, dtype=dtype)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # the vector does not come from it
        return model

    def count(self, batch: Sequence[Example]) -> int:
        return len(batch)

    def loss(self, model: Any, batch: Sequence[Example]) -> Tensor:
        anchors = [example.input_ids for example in batch]
        positives = [example.others[0] for example in batch]
        negatives = [example.others[1] for example in batch if len(example.others) > 1]
        vectors = self.embed(model, [*anchors, *positives, *negatives])
        scores = SCALE * _cosines(vectors[: len(batch)], vectors[len(batch) :])
        twins = torch.from_numpy(_twins(positives, [*positives, *negatives])).to(scores.device)
        return F.cross_entropy(scores.masked_fill(twins, -torch.inf), torch.arange(len(batch), device=scores.device))

    def evaluate(self, model: Any, examples: Sequence[Example], size: int, generate: bool) -> Evaluation:
        """Each anchor searches its positive among all. Predictions: the place at which it is found, from 1."""
        del generate
        vectors = torch.zeros(0)
        for indices in by_length(examples, size):
            texts = [examples[i].input_ids for i in indices] + [examples[i].others[0] for i in indices]
            found = self.embed(model, texts).cpu().view(2, len(indices), -1)
            if not len(vectors):
                vectors = torch.zeros(2, len(examples), found.shape[-1])
            vectors[:, indices] = found
        if not vectors.isfinite().all():
            raise FloatingPointError("a vector has NaN or infinite elements: try a lower learning rate")
        scores = _cosines(*vectors).numpy()
        positives = [example.others[0] for example in examples]
        scores[_twins(positives, positives)] = -np.inf
        ranks = (scores >= scores.diagonal()[:, None]).sum(1)  # its own among them; of equals it is the last
        metrics = {"mrr": float((1 / ranks).mean()), "recall_at_1": float((ranks == 1).mean())}
        return Evaluation(metrics, [{"rank": int(rank)} for rank in ranks])

    def embed(self, model: Any, texts: Sequence[Ids]) -> Tensor:
        """[n, hidden_size], each of length 1."""
        inputs = padded(texts, self.tokenizer.pad_token_id, model.device)
        hidden: Tensor = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"]
        if self.pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            places = mask.sum(1) - 1 if self.pooling == "last" else torch.zeros_like(mask[:, 0])
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), places]
        return F.normalize(pooled, dim=-1)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """[len(a), len(b)] in fp32, whatever the products of the model are in."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def _twins(rows: Sequence[Ids], columns: Sequence[Ids]) -> NDArray[np.bool_]:
    """[rows, columns]: the same text at another place, which is as right as the row's own and so no negative."""
    numbers = {ids: i for i, ids in enumerate({*rows, *columns})}
    same: NDArray[np.bool_] = np.array([numbers[ids] for ids in rows])[:, None] == np.array(
        [numbers[ids] for ids in columns]
    )
    same &= ~np.eye(len(rows), len(columns), dtype=np.bool_)
    return same
