"""For tests of tools: chat templates in the shapes of the field, and tiny bases that have one."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support import save_tiny_base

CONTEXT = 2048
"""Tokens: a tiny base writes one for each character, and tools are long."""

QWEN = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions.\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each call, return a json object within <tool_call></tool_call> XML tags:\n" }}
    {{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
"""Qwen2.5's, and Hermes': calls each in tags of their own."""

SMOLLM2 = r"""
{%- if tools %}
    {{- '<|im_start|>system\nYou have access to the following tools:\n<tools>' + tools | tojson + '</tools>\n\n' }}
    {{- 'The output MUST strictly adhere to the following format.\n<tool_call>[\n' }}
    {{- '{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},\n' }}
    {{- '... (more tool calls as required)\n]</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
"""SmolLM2-1.7B's: told to write a list, and nothing is said of calls in messages."""

SMOLLM3 = SMOLLM2.replace("tools %}", "xml_tools %}").replace("tools | tojson", "xml_tools | string").replace(
    '<tool_call>[\\n', '<tool_call>\\n').replace('\\n]</tool_call>', '\\n</tool_call>')  # fmt: skip
QWEN_CODER = QWEN.replace(
    """{{- '\\n<tool_call>\\n{"name": "' }}""", """{{- '\\n<tool_call>\\n<function=' }}"""
).replace("""{{- '", "arguments": ' }}""", "{{- '>' }}")
LLAMA3 = QWEN.replace("<tool_call>", "").replace("</tool_call>", "")
PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n{% endfor %}"
STRICT = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}{% endfor %}"


def save_tool_base(directory: Path, template: str, tags: bool) -> Path:
    """A tiny Llama with this chat template; tags: `<tool_call>` and `</tool_call>` are special tokens."""
    save_tiny_base("tiny-llama", directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    if tags:
        tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<tool_call>", "</tool_call>")])
        model = LlamaForCausalLM.from_pretrained(directory)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return directory
