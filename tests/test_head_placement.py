"""HeadPlacement: a head is whole and fits, or every fault is told; nothing that it does not know is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.adapter import Head, Limits
from adapters.config import parse_config
from adapters.head_placement import ROOT, UNUSED, HeadPlacement
from adapters.layout import BaseLayout, HeadForm, LinearShape

D = 8
DENSE = {"classifier.dense.weight": (D, D), "classifier.dense.bias": (D,)}
POOLER = {"bert.pooler.dense.weight": (D, D), "bert.pooler.dense.bias": (D,)}
FORMS = {
    "dense": HeadForm("classifier.out_proj", DENSE),
    "pooler": HeadForm("classifier", POOLER, given=True),
    "no pooler": HeadForm("classifier", POOLER),
}
SAVED = {"dense": ["classifier", "score"], "pooler": ["classifier", "pooler"], "no pooler": ["classifier", "pooler"]}


def placement(form: str, saved: list[str] | None = None, task: str = "SEQ_CLS", **options: Any) -> HeadPlacement:
    config = {
        "peft_type": "LORA", "task_type": task, "r": 2, "lora_alpha": 4, "target_modules": ["query"],
        "modules_to_save": SAVED[form] if saved is None else saved, **options,
    }  # fmt: skip
    layout = BaseLayout({"query": LinearShape(D, D, True)}, "bert", D, False, heads={"SEQ_CLS": FORMS[form]})
    return HeadPlacement(parse_config(config), layout, Limits(max_labels=5), task)


def tensors_of(form: str, labels: int = 3) -> dict[str, Tensor]:
    last = FORMS[form].last
    shapes = {**FORMS[form].inner, f"{last}.weight": (labels, D), f"{last}.bias": (labels,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def made(head: HeadPlacement, tensors: dict[str, Tensor]) -> Head | None:
    for name, tensor in tensors.items():
        assert head.take(f"{ROOT}{name}", tensor) is not None, name
    return head.make()


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_head_is_placed(form: str) -> None:
    head, tensors = placement(form), tensors_of(form)
    result = made(head, tensors)
    assert result is not None
    assert head.reasons == []
    last = FORMS[form].last
    assert result.weight is tensors[f"{last}.weight"]
    assert result.bias is tensors[f"{last}.bias"]
    assert {name: result.inner[name] is tensors[name] for name in FORMS[form].inner} == dict.fromkeys(
        FORMS[form].inner, True
    )


def test_what_the_base_has_too_need_not_be_saved() -> None:
    head = placement("pooler")
    result = made(head, {name: t for name, t in tensors_of("pooler").items() if "pooler" not in name})
    assert result is not None
    assert (result.inner, head.reasons) == ({}, [])


@pytest.mark.parametrize(
    ("form", "without", "lacking"),
    [
        ("dense", "classifier.dense.bias", ["classifier.dense.bias"]),
        ("pooler", "bert.pooler.dense.weight", ["bert.pooler.dense.weight"]),
        ("no pooler", "bert.pooler", [*POOLER]),
    ],
)
def test_a_head_that_is_not_whole_is_refused_by_its_parts(form: str, without: str, lacking: list[str]) -> None:
    head = placement(form)
    made(head, {name: tensor for name, tensor in tensors_of(form).items() if not name.startswith(without)})
    assert head.reasons == [f"the head lacks {name!r}: it must be saved (modules_to_save)" for name in lacking]


def test_shapes_are_checked() -> None:
    head, tensors = placement("dense"), tensors_of("dense", labels=6)
    made(head, {**tensors, "classifier.dense.bias": torch.zeros(D + 1)})
    assert head.reasons == [
        f"'classifier.dense.bias' has shape ({D + 1},), this base needs ({D},)",
        f"head 'classifier.out_proj' has shape (6, {D}), this base needs (labels, {D})",
    ]


def test_what_is_not_announced_is_not_taken() -> None:
    head = placement("pooler", saved=["classifier"])
    assert head.take(f"{ROOT}bert.pooler.dense.weight", torch.zeros(D, D)) is None
    assert head.take(f"{ROOT}classifier.weight", torch.zeros(3, D)) == "weight of the head classifier"
    assert placement("pooler", saved=[]).take(f"{ROOT}classifier.weight", torch.zeros(3, D)) is None


def test_a_head_of_another_form_is_not_taken() -> None:
    head = placement("dense")
    assert head.take(f"{ROOT}classifier.weight", torch.zeros(3, D)) is None
    assert head.make() is None
    assert head.reasons == ["a SEQ_CLS adapter needs one head (classifier.out_proj), saved with it"]


def test_modules_that_are_no_part_of_a_head_are_refused_by_name() -> None:
    head = placement("dense", saved=["classifier", "embeddings"])
    made(head, tensors_of("dense"))
    assert head.reasons == ["modules_to_save 'embeddings' is not supported, only parts of a head and embeddings"]


def test_a_task_that_the_base_does_not_serve_is_refused_with_the_reason() -> None:
    head = placement("dense")
    head.layout = BaseLayout({}, "bert", D, False, unserved={"SEQ_CLS": "its head is a riddle"})
    assert made(head, tensors_of("dense")) is None
    assert head.reasons == ["its head is a riddle"]


@pytest.mark.parametrize("bias", ["none", "all"])
def test_biases_that_peft_saves_again_are_known(bias: str) -> None:
    head, tensors = placement("pooler", bias=bias), tensors_of("pooler")
    made(head, tensors)
    copied = head.take(f"{ROOT}classifier.modules_to_save.bias", tensors["classifier.bias"].clone())
    original = head.take(f"{ROOT}classifier.original_module.bias", torch.zeros(3))
    assert copied == "bias of the head classifier"
    assert original == (UNUSED if bias == "all" else None)
    assert head.reasons == ([] if bias == "all" else ["the head has 'classifier.bias' twice"])
    if bias == "all":
        head.take(f"{ROOT}classifier.modules_to_save.bias", tensors["classifier.bias"] + 1)
        assert head.reasons == ["the head has 'classifier.bias' twice"]
