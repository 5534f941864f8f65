"""Flags over environment over defaults; settings outside their range are refused."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from server.config import InvalidConfig, ServerConfig, add_flags, load_config


def parse(*flags: str, **environment: str) -> ServerConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return load_config(vars(parser.parse_args(flags)), environment)


def test_every_field_has_a_flag_and_a_variable() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for item in dataclasses.fields(ServerConfig):
        assert "--" + item.name.replace("_", "-") in text
        assert f"$MULTILORA_{item.name.upper()}" in text.replace("\n", "").replace(" ", "")


def test_flags_over_environment_over_defaults() -> None:
    config = parse("--max-loras", "3", MULTILORA_MAX_LORAS="5", MULTILORA_PORT="9", MULTILORA_ALLOW_PUBLIC="yes")
    assert (config.max_loras, config.port, config.allow_public) == (3, 9, True)
    assert config.block_size == ServerConfig().block_size


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"max_loras": 0}, "max_loras must not be 0"),
        ({"port": -1}, "port must not be -1"),
        ({"kernel": "magic"}, "kernel 'magic' is unknown"),
        ({"lora_dtype": "int4"}, "lora_dtype 'int4' is unknown: choose from auto, float32, float16, bfloat16"),
        ({"quantize": "int2"}, "quantize 'int2' is unknown: choose from"),
        ({"log_level": "loud"}, "log_level 'loud' is unknown"),
        ({"host": "0.0.0.0"}, "--allow-public"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidConfig, match=fault):
        ServerConfig(**settings)


@pytest.mark.parametrize(("name", "value"), [("MULTILORA_PORT", "http"), ("MULTILORA_ALLOW_PUBLIC", "perhaps")])
def test_bad_variables_are_named(name: str, value: str) -> None:
    with pytest.raises(InvalidConfig, match=name):
        parse(**{name: value})


def test_the_root_is_the_adapter_directory_unless_told_otherwise(tmp_path: Path) -> None:
    assert ServerConfig().root is None
    assert ServerConfig(adapter_dir=str(tmp_path)).root == tmp_path.resolve()
    assert ServerConfig(adapter_dir="x", adapter_root=str(tmp_path)).root == tmp_path.resolve()
