"""Expressions that choose modules by their names, as PEFT's configs have them. Knows nothing of configs.

Checkpoints come from others, so that an expression is matched within a bound on time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

import regex

from adapters.errors import InvalidAdapter

MATCH_TIMEOUT_S = 0.05
PLAIN_NAMES = 4096
WHOLE = "{}"
KEY = r"(.*\.)?({})"
"""How a key of rank_pattern or alpha_pattern matches a module's name (peft.utils.other.get_pattern_key)."""
LAYER = r"(?:^|.*?\.){}\.(?P<index>\d+)\..*"
"""How a `layers_pattern` finds the number of a module's layer: the first one (peft/tuners/tuners_utils.py)."""
ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\..*"
"""The same where there is no `layers_pattern`."""


def match(form: str, expression: str, module: str) -> regex.Match[str] | None:
    """The match of `expression`, put into `form`, with the whole name `module`. Raises InvalidAdapter."""
    try:
        return regex.fullmatch(form.format(expression), module, timeout=MATCH_TIMEOUT_S, concurrent=True)
    except TimeoutError:
        raise InvalidAdapter([f"the expression {expression[:200]!r} takes too long to match"]) from None


def first_match(expressions: Iterable[str], module: str) -> str:
    """The first key of a pattern for `module`, else `module` itself."""
    return next((key for key in expressions if _is_key_of(key, module)), module)


def _is_key_of(key: str, module: str) -> bool:
    """There may be a key for each module, and as many modules, so that plain names are compared as such."""
    name = _plain_name(key)
    if name is None:
        return match(KEY, key, module) is not None
    return module == name or module.endswith(f".{name}")


@lru_cache(PLAIN_NAMES)
def _plain_name(expression: str) -> str | None:
    """The only text that `expression` matches, where it is plainly one."""
    return re.sub(r"\\(.)", r"\1", expression) if re.fullmatch(r"(?:[A-Za-z0-9_]|\\[.\-])+", expression) else None


def layer_index(expressions: Iterable[str], module: str) -> int | None:
    """The number of the layer that `module` is in. expressions: for the name of the list of layers; none: any name."""
    forms = [(LAYER, expression) for expression in expressions] or [(ANY_LAYER, "")]
    found = (match(form, expression, module) for form, expression in forms)
    return next((int(each["index"]) for each in found if each and each["index"]), None)


def ends_in(module: str, names: Iterable[str]) -> bool:
    """Whether `module` has one of `names`, or ends in one after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def covers(saved: str, module: str) -> bool:
    """Whether `module` is one that `saved`, a name in modules_to_save, names, or a part of one."""
    return f".{saved}." in f".{module}."


def bad_expression(field: str, expression: str, form: str = WHOLE) -> list[str]:
    """Why `expression` cannot be served, if so."""
    try:
        re.compile(form.format(expression))
        regex.compile(form.format(expression))
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return [f"{field}: {expression[:200]!r} is no regular expression that is served ({error})"]
    return []
