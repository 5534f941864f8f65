"""adapter_config.json: every field is honoured, harmless or refused by name, and means what it means to peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.config import LoraConfig, parse_config
from adapters.config_fields import HONOURED, REFUSED_WHEN_ON, TASK_TYPES, WITHOUT_EFFECT
from adapters.errors import InvalidAdapter
from adapters.patterns import layer_index

GOOD = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
MODULE = "model.layers.0.self_attn.q_proj"


def reasons_against(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapter) as caught:
        parse_config({**GOOD, **changes})
    return caught.value.reasons


@pytest.mark.parametrize("name", REFUSED_WHEN_ON)
@pytest.mark.parametrize("value", [True, {"some": "value"}, ["value"], "value", 0])
def test_what_is_not_served_is_refused_by_name_when_on(name: str, value: Any) -> None:
    assert reasons_against(**{name: value}) == (f"{name} is not supported",)


@pytest.mark.parametrize("name", [*REFUSED_WHEN_ON, "a_field_of_the_future"])
@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_any_field_is_accepted_when_off(name: str, value: Any) -> None:
    assert parse_config({**GOOD, name: value}) == parse_config(GOOD)


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_a_field_without_effect_changes_nothing(name: str) -> None:
    assert parse_config({**GOOD, name: "value"}) == parse_config(GOOD)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"a_field_of_the_future": 1}, "unknown field 'a_field_of_the_future'", id="unknown-field"),
        pytest.param({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported", id="other-method"),
        *[
            pytest.param(
                {"peft_type": method},
                f"peft_type {method!r} is not supported, only 'LORA' and 'ADALORA': it",
                id=method,
            )
            for method in ("LOHA", "LOKR", "OFT", "IA3", "VERA", "PREFIX_TUNING")
        ],
        pytest.param({"peft_type": None}, "peft_type None", id="no-method"),
        pytest.param({"task_type": "QUESTION_ANS"}, "task_type 'QUESTION_ANS' is not supported", id="task"),
        pytest.param({"task_type": ["CAUSAL_LM"]}, "task_type", id="task-list"),
        pytest.param({"r": 0}, "r must be a positive whole number, not 0", id="r-zero"),
        pytest.param({"r": -1}, "r must be a positive whole number, not -1", id="r-negative"),
        pytest.param({"r": True}, "r must be a positive whole number, not True", id="r-true"),
        pytest.param({"r": "8"}, "r must be a positive whole number, not '8'", id="r-string"),
        pytest.param({"r": 8.0}, "r must be a positive whole number, not 8.0", id="r-float"),
        pytest.param({"r": None}, "r must be a positive whole number, not None", id="r-none"),
        pytest.param({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, not nan", id="alpha-nan"),
        pytest.param({"lora_alpha": float("inf")}, "lora_alpha must be a finite number, not inf", id="alpha-inf"),
        pytest.param({"lora_alpha": 10**400}, "lora_alpha must be a finite number", id="alpha-beyond-float"),
        pytest.param({"lora_alpha": "16"}, "lora_alpha must be a finite number, not '16'", id="alpha-string"),
        pytest.param({"lora_alpha": None}, "lora_alpha must be a finite number, not None", id="alpha-none"),
        pytest.param({"use_rslora": "false"}, "use_rslora must be true or false, not 'false'", id="rslora-string"),
        pytest.param({"bias": "some"}, "bias 'some' is not supported", id="bias-some"),
        pytest.param({"lora_bias": "true"}, "lora_bias must be true or false, not 'true'", id="lora-bias-string"),
        pytest.param({"bias": True}, "bias True is not supported", id="bias-true"),
        pytest.param({"use_dora": 1}, "use_dora must be true or false, not 1", id="dora-number"),
        pytest.param({"use_dora": True, "lora_bias": True}, "use_dora does not go with lora_bias", id="dora-lora-bias"),
        pytest.param({"target_modules": []}, "target_modules must be", id="targets-empty"),
        pytest.param({"target_modules": ""}, "target_modules must be", id="targets-empty-string"),
        pytest.param({"target_modules": None}, "target_modules must be", id="targets-none"),
        pytest.param({"target_modules": 5}, "target_modules must be", id="targets-number"),
        pytest.param({"target_modules": ["q_proj", 5]}, "target_modules must be", id="targets-mixed"),
        pytest.param({"target_modules": {"q_proj": 1}}, "target_modules must be", id="targets-object"),
        pytest.param({"target_modules": "*_proj"}, "target_modules: '*_proj' is no regular exp", id="targets-regexp"),
        pytest.param({"target_modules": "q{99999999999}"}, "target_modules:", id="targets-regexp-repeats"),
        pytest.param({"target_modules": "(" * 9999 + ")" * 9999}, "target_modules:", id="targets-regexp-deep"),
        pytest.param({"exclude_modules": 5}, "exclude_modules must be a list of names or", id="excluded-number"),
        pytest.param({"exclude_modules": [""]}, "exclude_modules must be a list of names or", id="excluded-empty"),
        pytest.param({"exclude_modules": "q("}, "exclude_modules: 'q(' is no regular expression", id="excluded-regexp"),
        pytest.param({"layers_to_transform": "1"}, "layers_to_transform must be a whole number", id="layers-string"),
        pytest.param({"layers_to_transform": [True]}, "layers_to_transform must be a whole number", id="layers-true"),
        pytest.param({"layers_to_transform": 1.0}, "layers_to_transform must be a whole number", id="layers-float"),
        pytest.param(
            {"layers_to_transform": 1, "layers_pattern": [1]}, "layers_pattern must be a name or", id="list-number"
        ),
        pytest.param({"layers_to_transform": 1, "layers_pattern": "("}, "layers_pattern: '(' is no", id="list-regexp"),
        pytest.param({"layers_pattern": "layers"}, "layers_pattern says nothing without", id="list-alone"),
        pytest.param(
            {"layers_to_transform": 1, "target_modules": "all-linear"},
            "layers_to_transform and layers_pattern need names in target_modules",
            id="layers-with-expression",
        ),
        pytest.param({"modules_to_save": "score"}, "modules_to_save must be a list", id="saved-string"),
        pytest.param({"modules_to_save": [1]}, "modules_to_save must be a list", id="saved-number"),
        pytest.param({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object", id="ranks-list"),
        pytest.param({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] has the value 0", id="ranks-zero"),
        pytest.param({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern['q_proj'] has the value 2.5", id="ranks-float"),
        pytest.param({"rank_pattern": {"q(": 4}}, "rank_pattern: 'q(' is no regular expression", id="ranks-regexp"),
        pytest.param({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern:", id="ranks-regexp-with-flags"),
        pytest.param({"alpha_pattern": 3}, "alpha_pattern must be an object", id="alphas-number"),
        pytest.param({"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern['q_proj'] has the value '3'", id="alphas-str"),
        pytest.param({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern['q_proj']", id="alphas-beyond-float"),
        pytest.param({"alpha_pattern": {"[": 3}}, "alpha_pattern: '[' is no regular expression", id="alphas-regexp"),
        *[
            pytest.param({"init_lora_weights": init}, f"init_lora_weights {init!r} changed the base", id=f"init-{init}")
            for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "unheard-of")
        ],
    ],
)
def test_a_bad_value_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    reasons = reasons_against(**changes)
    assert len(reasons) == 1
    assert reasons[0].startswith(reason)


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_field_that_must_be_there_is_named(field: str) -> None:
    with pytest.raises(InvalidAdapter, match=rf"^{field} "):
        parse_config({key: value for key, value in GOOD.items() if key != field})


@pytest.mark.parametrize("data", [None, [], "text", 5, [GOOD]])
def test_only_an_object_is_a_config(data: Any) -> None:
    with pytest.raises(InvalidAdapter, match="not a JSON object"):
        parse_config(data)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_keep_the_base_are_accepted(init: Any) -> None:
    assert parse_config({**GOOD, "init_lora_weights": init}) == parse_config(GOOD)


@pytest.mark.parametrize("task_type", [None, *TASK_TYPES])
def test_every_served_task_is_accepted(task_type: str | None) -> None:
    assert parse_config({**GOOD, "task_type": task_type}).task_type == task_type


def test_all_faults_are_told_at_once() -> None:
    reasons = reasons_against(
        peft_type="LOHA", task_type="POETRY", r=0, lora_alpha="x", bias="some", target_modules=[], use_dora=1,
        init_lora_weights="pissa", novelty=1, rank_pattern={"q": -1}, alpha_pattern=[1],
    )  # fmt: skip
    named = ["peft_type", "task_type", "use_dora", "init_lora_weights", "novelty", "r must", "lora_alpha", "bias"]
    for name in [*named, "target_modules", "rank_pattern", "alpha_pattern"]:
        assert sum(name in reason for reason in reasons) == 1, name
    assert len(reasons) == 11


def test_every_field_of_peft_stands_in_exactly_one_list() -> None:
    never_saved = {field.name for field in dataclasses.fields(peft.LoraConfig)} - set(peft.LoraConfig().to_dict())
    assert never_saved == {"runtime_config"}, (
        "peft drops another field when saving: see what it does, then name it here"
    )
    for name in sorted(set(peft.LoraConfig().to_dict())):
        lists = [name in HONOURED, name in WITHOUT_EFFECT, name in REFUSED_WHEN_ON]
        assert sum(lists) == 1, (
            f"peft.LoraConfig.{name} must stand in exactly one list of adapters/config.py: HONOURED when LoraConfig "
            "carries out what it means, WITHOUT_EFFECT when it changes nothing at inference, else REFUSED_WHEN_ON"
        )


def test_no_list_names_a_field_that_peft_does_not_have() -> None:
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(REFUSED_WHEN_ON) | HONOURED | WITHOUT_EFFECT <= known


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="list"),
        pytest.param(
            {"target_modules": ["model.layers.1.mlp.up_proj", "0.self_attn.k_proj", "o_proj"]}, id="list-of-paths"
        ),
        pytest.param({"target_modules": r".*layers\.(0|2)\.self_attn\.(q|k)_proj"}, id="regexp"),
        pytest.param({"target_modules": r"model\.layers\.1\..*_proj"}, id="regexp-whole-name"),
        pytest.param({"target_modules": "all-linear"}, id="all-linear"),
        pytest.param({"target_modules": "all-linear", "modules_to_save": ["down_proj"]}, id="modules-to-save"),
        pytest.param({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}, id="layers"),
        pytest.param({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, id="layer"),
        pytest.param(
            {
                "target_modules": ["q_proj", "model.layers.1.self_attn.k_proj"],
                "layers_to_transform": [2],
                "layers_pattern": ["h", "lay.*"],
            },
            id="layers-but-a-whole-name",
        ),
        pytest.param(
            {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "model.layers.0.self_attn.q_proj"]},
            id="excluded-names",
        ),
        pytest.param({"target_modules": ["q_proj"], "exclude_modules": r".*\.[01]\..*"}, id="excluded-expression"),
        pytest.param({"target_modules": ["q_proj"], "use_rslora": True}, id="rslora"),
        pytest.param({"target_modules": "all-linear", "rank_pattern": {"q_proj": 4, "mlp.*": 6}}, id="rank-pattern"),
        pytest.param(
            {
                "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
                "rank_pattern": {r"layers\.1\.mlp\.up_proj": 5, "^model.layers.2.self_attn.k_proj": 3, "q_proj": 16},
                "alpha_pattern": {"down_proj": 3, r".*\.0\.self_attn\.q_proj": 1},
                "use_rslora": True,
            },
            id="both-patterns",
        ),
        pytest.param(
            {
                "target_modules": ["q_proj"],
                "rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 4},
                "alpha_pattern": {"q.*": 9, r"\d.self_attn.q_proj": 7},
            },
            id="first-pattern-wins",
        ),
    ],
)
def test_ranks_scalings_and_targets_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=20, **options).save_pretrained(str(tmp_path))
    theirs = peft.LoraConfig.from_pretrained(
        str(tmp_path)
    )  # saving sorts the patterns, of which the first match counts
    model = tiny_llama()
    linears = [name for name, m in model.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)]
    built = {
        name.removeprefix("base_model.model."): module
        for name, module in peft.get_peft_model(model, theirs).named_modules()
        if isinstance(module, LoraLayer)
    }
    config = parse_config(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert {name for name in linears if config.is_target(name)} == set(built)
    assert {name: config.rank_of(name) for name in built} == {name: m.r["default"] for name, m in built.items()}
    scalings = {name: module.scaling["default"] for name, module in built.items()}
    assert {name: config.scaling_of(name) for name in built} == pytest.approx(scalings, rel=1e-12)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(HONOURED)), JSON, max_size=4))
def test_any_json_is_understood_or_refused(changes: dict[str, Any]) -> None:
    config, reasons = config_or_reasons({**GOOD, **changes})
    if config is None:
        assert reasons
    else:
        assert config.rank_of(MODULE) >= 1
        assert isinstance(config.scaling_of(MODULE), float)
        assert config.is_target(MODULE) in (True, False)


def config_or_reasons(data: dict[str, Any]) -> tuple[LoraConfig | None, tuple[str, ...]]:
    try:
        return parse_config(data), ()
    except InvalidAdapter as refusal:
        return None, refusal.reasons


def test_an_alternation_that_names_no_list_of_layers_finds_none() -> None:
    """Ungrouped, it has a half without a number."""
    assert layer_index(["q_proj|layers"], "model.q_proj") is None
    assert layer_index(["(layers|h)"], "model.h.3.attn") == 3
