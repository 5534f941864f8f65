"""Draws docs/picture.svg: README's first request, as a running server answers it. Widths are its tokens, to scale.

make serve
python docs/picture.py http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COLOURS = ("#2563eb", "#c2410c", "#15803d", "#64748b")
WIDTH, HEIGHT = 1000, 404
ROW_X, ROW_WIDTH, GAP = 320, 360, 6
TITLES = {"SEQ_CLS": "one of six classes", "TOKEN_CLS": "a tag for each word", "CAUSAL_LM": "text"}


def request_of_readme() -> dict[str, Any]:
    """The body of README's first call."""
    found = re.search(r"/v1/predict .*? -d '(\{.*?\})'\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    body: dict[str, Any] = json.loads(found[1])
    return body


def ask(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/predict", json.dumps(body).encode(), headers)
    ) as answer:
        results: list[dict[str, Any]] = json.load(answer)["results"]
    return results


def told(result: dict[str, Any]) -> list[str]:
    """What the picture says of one answer, in two lines."""
    if result["type"] == "SEQ_CLS":
        return [result["label"], f"{result['score']:.3f}"]
    if result["type"] == "TOKEN_CLS":
        tags = [f"{entity['text'].strip(',')} {entity['label']}" for entity in result["entities"]]
        return [", ".join(tags[4:6]), tags[6]]
    words = result["text"].split()
    half = next((n for n in range(len(words), 0, -1) if len(" ".join(words[:n])) <= 34), 0)
    rest = " ".join(words[half:])
    return [" ".join(words[:half]), rest if len(rest) <= 32 else rest[:31] + "…"]


def text(x: float, y: float, what: str, size: int = 13, fill: str = "#0f172a", **more: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{escape(what)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, **more: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    corners = f'rx="{min(4, width / 4):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" {corners} fill="{fill}"{extra}/>'


def card(x: float, y: float, colour: str, title: str, lines: list[str]) -> list[str]:
    """A request or an answer."""
    parts = [box(x, y, 266, 66, "#ffffff", stroke=colour, stroke_width="1.5"), box(x, y, 5, 66, colour)]
    parts.append(text(x + 16, y + 20, title, 12, colour, font_weight="600"))
    return parts + [text(x + 16, y + 39 + 17 * n, line) for n, line in enumerate(lines)]


def segments(tokens: list[int]) -> list[tuple[float, float]]:
    """x and width of each request's tokens."""
    unit = (ROW_WIDTH - GAP * (len(tokens) - 1)) / sum(tokens)
    starts = [ROW_X + unit * sum(tokens[:n]) + GAP * n for n in range(len(tokens))]
    return [(start, unit * count) for start, count in zip(starts, tokens, strict=True)]


def batch(results: list[dict[str, Any]]) -> list[str]:
    """The packed row, the base under all of it, and each adapter under its own tokens."""
    tokens = [result["usage"]["prompt_tokens"] for result in results]
    middle = {"text_anchor": "middle"}
    centre = ROW_X + ROW_WIDTH / 2
    parts = [text(centre, 66, f"one batch: {sum(tokens)} tokens in one row", 14, font_weight="600", **middle)]
    for (x, width), count, colour in zip(segments(tokens), tokens, COLOURS, strict=True):
        cell = width / count
        parts += [box(x + cell * n, 80, cell - 0.8, 22, colour) for n in range(count)]
        parts.append(text(x + width / 2, 119, str(count), 11, colour, **middle))
    parts.append(text(centre, 152, "one forward pass, each layer:", 14, font_weight="600", **middle))
    parts.append(box(ROW_X, 166, ROW_WIDTH, 58, "#e2e8f0", stroke="#94a3b8"))
    parts.append(text(centre, 190, "x Wᵀ", 17, font_style="italic", **middle))
    parts.append(text(centre, 211, "SmolLM2-135M, frozen, once in memory", 12, "#475569", **middle))
    parts.append(text(centre, 246, "+", 18, **middle))
    for (x, width), result, colour in zip(segments(tokens), results, COLOURS, strict=True):
        if result["digest"] is None:
            parts.append(box(x, 258, width, 34, "none", stroke=colour, stroke_dasharray="4 3"))
            parts.append(text(x + width / 2, 279, "base alone", 11, colour, **middle))
        else:
            parts.append(box(x, 258, width, 34, colour))
            if width > 60:
                parts.append(text(x + width / 2, 280, "(x Aᵀ) Bᵀ", 13, "#ffffff", font_style="italic", **middle))
    parts.append(text(centre, 314, "each adapter for its own tokens", 12, "#475569", **middle))
    parts.append(text(centre, 352, "each row's result is what peft gives", 12, "#475569", **middle))
    parts.append(text(centre, 370, "with that adapter alone", 12, "#475569", **middle))
    return parts


def draw(body: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The whole picture."""
    arrow = {"stroke": "#94a3b8", "stroke_width": "2", "marker_end": "url(#to)"}
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in arrow.items())
    parts = [box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "#f8fafc", stroke="#e2e8f0")]
    parts += [text(20, 34, "requests", 15, "#475569", font_weight="600")]
    parts += [text(714, 34, "answers", 15, "#475569", font_weight="600")]
    for n, (item, result, colour) in enumerate(zip(body["items"], results, COLOURS, strict=True)):
        y = 50 + 86 * n
        parts += card(20, y, colour, item["task"], [item["input"]])
        parts += card(714, y, colour, TITLES[result["type"]], told(result))
    parts += [f'<line x1="290" y1="91" x2="312" y2="91"{more}/>', f'<line x1="684" y1="91" x2="706" y2="91"{more}/>']
    parts += batch(results)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">'
    )
    title = "<title>Four requests for four tasks share one batch of SmolLM2</title>"
    marker = '<defs><marker id="to" markerWidth="7" markerHeight="7" refX="4" refY="3.5" orient="auto">'
    marker += '<path d="M0,0 L7,3.5 L0,7 z" fill="#94a3b8"/></marker></defs>'
    return "\n".join([head, title, marker, *parts, "</svg>", ""])


if __name__ == "__main__":
    asked = request_of_readme()
    (ROOT / "docs" / "picture.svg").write_text(draw(asked, ask(sys.argv[1], asked)))
