"""The process in which chat templates of adapters are rendered: a line of JSON in, a line out, until the input ends.

Run as a file, by templates.py: it imports nothing of ours, and no torch. A template may ask for any memory
(`'a' * 10 ** 12`) and any time (`9 ** (10 ** 9)`, which no thread can interrupt): the memory is bounded here, the time
by the caller.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

MEMORY_BYTES = 1 << 30
"""Of addresses, the interpreter's and its libraries' among them."""
MAX_TEXT = 16 << 20
"""Characters of one rendered conversation."""


def answer(request: dict[str, Any]) -> dict[str, str]:
    """`text`; or `error`, and its `kind`: syntax, limit, or refused by the template itself."""
    try:
        rendered: Any = render_jinja_template(
            conversations=[request["messages"]], tools=request["tools"], chat_template=request["template"],
            **request["options"],
        )  # fmt: skip
    except TemplateSyntaxError as error:
        return {"kind": "syntax", "error": str(error)}
    except MemoryError:
        return {"kind": "limit", "error": "it takes too much memory"}
    except Exception as error:  # a template may raise whatever its expressions do
        return {"kind": "refused", "error": str(error) or type(error).__name__}
    text = rendered[0][0]
    if len(text) > MAX_TEXT:
        return {"kind": "limit", "error": f"it makes more than {MAX_TEXT} characters"}
    return {"text": text}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
