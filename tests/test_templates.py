"""Chat templates that adapters bring: rendered as transformers does, and what they may not take."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from server.engine.chat import PROBE, PROBE_TOOL, ChatTemplate
from server.templates import TemplateLimit, TemplateProcess
from tests.support import CHAT_TEMPLATE, tiny_tokenizer

FOX = [{"role": "user", "content": "fox 日本"}]
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ bos_token }}{{ m }}{% endfor %}"
)
GREEDY = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    ("{{ 9 ** (messages | length * 10 ** 9) > 1 }}", "seconds"),
    ("{{ 'a' * (messages | length * 10 ** 12) }}", "memory"),
    ("{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}", "memory"),
    ("{{ 'a' * (messages | length * 20000000) }}", "characters"),
]


@pytest.fixture(scope="module")
def process() -> TemplateProcess:
    return TemplateProcess(timeout_s=1.0)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TOOLS])
@pytest.mark.parametrize("tools", [[], [PROBE_TOOL]], ids=["plain", "tools"])
def test_it_renders_as_transformers_does(process: TemplateProcess, template: str, tools: list[dict[str, Any]]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for messages in (FOX, PROBE if tools else [*FOX, {"role": "assistant", "content": "dog"}]):
        here, apart = ChatTemplate(tokenizer), ChatTemplate(tokenizer, process.render)
        given: Any = (messages, tools, True)
        ids = apart._apply(*given, add_generation_prompt=True)
        assert ids == here._apply(*given, add_generation_prompt=True) != []


@pytest.mark.parametrize(("template", "reason"), GREEDY, ids=[each[0][:30] for each in GREEDY])
def test_time_and_memory_are_bounded(process: TemplateProcess, template: str, reason: str) -> None:
    """While other threads go on; and the next template is rendered."""
    with pytest.raises(TemplateLimit, match=reason):
        process.render(template, FOX, [], {})
    assert process.render("{{ messages[0].content }}", FOX, [], {}) == "fox 日本"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for %}", TemplateSyntaxError),
        ("{{ raise_exception('no') }}", TemplateError),
        ("{{ 1 // (messages | length - 1) }}", TemplateError),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TemplateError),
    ],
)
def test_what_a_template_raises(process: TemplateProcess, template: str, error: type[Exception]) -> None:
    with pytest.raises(TemplateError) as caught:
        process.render(template, FOX, [], {})
    assert type(caught.value) is error
