"""An HTML page in one file, readable on phones, in light and in dark, and the parts that pages share.

All functions return HTML. Arguments named `content`, `caption` or `cells` are HTML; all others are text, which is escaped.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5a6577; --line: #d5dae2; --back: #fff; --box: #f1f4f8; --accent: #2f74b5;
  --good: #1a7f37; --bad: #b3261e; --warn: #9a6700; --bar: 6rem }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --soft: #a0aab8; --line: #39424f; --back: #14181e; --box: #222932;
  --accent: #6db0ee; --good: #57c474; --bad: #ff8f85; --warn: #e0b040 } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 1.5rem auto; max-width: 76rem;
  padding: 0 1rem; overflow-wrap: anywhere }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
a { color: var(--accent) } .hint { color: var(--soft); max-width: 52rem }
.verdict { font-size: 1.2rem; font-weight: 600 } .sound { color: var(--good) } .fatal, .error { color: var(--bad) }
.warning { color: var(--warn) } .note { color: var(--accent) } .fatal, .error, .warning { font-weight: 600 }
pre, code { background: var(--box); border-radius: 4px } code { padding: .1rem .3rem }
pre { padding: .6rem .8rem; white-space: pre-wrap } pre code { padding: 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; vertical-align: top; white-space: nowrap; overflow-wrap: normal }
td:first-child, th:first-child { text-align: left } td:first-child { white-space: normal; overflow-wrap: break-word; min-width: 6rem }
td.text, th.text, table.markdown td, table.markdown th { text-align: left }
td:has(> code) { white-space: normal; overflow-wrap: anywhere; min-width: 12rem }
th { color: var(--soft); font-weight: 600 } table.sortable th { cursor: pointer; text-decoration: underline dotted }
.count { display: inline-block; min-width: 3.2em }
.bar { display: inline-block; width: var(--bar); height: .8rem; vertical-align: middle; background:
  linear-gradient(var(--accent), var(--accent)) no-repeat 0 0 / calc(100% * var(--share)) 100% }
.keys span { margin-right: 1rem; display: inline-block }
.keys i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem }
details { margin: .3rem 0 } summary { cursor: pointer } details li { font: 13px ui-monospace, monospace }
figure { margin: 0 0 1rem } figcaption { font-size: 13px } img, svg { max-width: 100%; height: auto }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); gap: .8rem } .gallery img { width: 100% }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 0 1.5rem } .charts svg { width: 100% }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-start }
.map img { width: 26rem; image-rendering: pixelated; border: 1px solid var(--line) }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
@media (max-width: 600px) { :root { --bar: 2.2rem } td, th { padding-right: .5rem } .histogram text { font-size: 19px } }
"""
SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) table.querySelectorAll('th').forEach((head, column) => {
  head.tabIndex = 0;
  const sort = () => {
    const down = head.dataset.down !== '1'; head.dataset.down = down ? '1' : '0';
    const rows = [...table.querySelectorAll('tr')].slice(1), value = row => row.children[column].textContent;
    const number = row => { const found = parseFloat(value(row)); return isNaN(found) ? -Infinity : found };
    const numeric = rows.some(row => number(row) > -Infinity);
    rows.sort((a, b) => (numeric ? number(b) - number(a) : value(a).localeCompare(value(b))) * (down ? 1 : -1));
    rows.forEach(row => row.parentNode.appendChild(row));
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort() });
});
"""


def write_document(path: Path, title: str, content: str) -> None:
    """Write a page with this title and body."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{content}<script>{SCRIPT}</script></body></html>'
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def table(
    names: Iterable[str], cells: Iterable[Iterable[object]], sortable: bool = False, shown: int = sys.maxsize
) -> str:
    """A table, which scrolls by itself where the screen is too narrow.

    Args:
        names: of the columns.
        cells: by row. The first column and columns of words stand left, others right.
        sortable: a click on a name sorts the rows.
        shown: rows after so many are folded.
    """
    names, rows = list(names), [[str(cell) for cell in row] for row in cells]
    kinds = [' class="text"' if any(map(_is_word, column)) else "" for column in zip(*rows, strict=True)]
    kinds = kinds or [""] * len(names)
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(names, kinds, strict=True))

    def body(part: Sequence[Sequence[str]]) -> str:
        lines = ("".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in part)
        start = '<table class="sortable">' if sortable else "<table>"
        return (
            f'<div class="scroll">{start}<tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
        )

    rest = folded(f"{len(rows) - shown} more", body(rows[shown:])) if len(rows) > shown else ""
    return body(rows[:shown]) + rest


def _is_word(cell: str) -> bool:
    return cell[:1].isalpha() and cell not in ("n/a", "None", "nan")


def cell(value: Any) -> str:
    """A value of a table: floats with three digits, None as n/a."""
    return "n/a" if value is None else f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def hint(text: str) -> str:
    """A paragraph that explains what is above it."""
    return f'<p class="hint">{escape(text)}</p>'


def keys(colors: Iterable[tuple[str, str]]) -> str:
    """The legend of a figure, from pairs of a text and a CSS color."""
    shown = (f'<span><i style="background:{color}"></i>{escape(text)}</span>' for text, color in colors)
    return f'<p class="keys">{"".join(shown)}</p>'


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """Content that a click on its summary, which is HTML, shows."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{content}</details>"


def figure(content: str, caption: str) -> str:
    """A picture with its caption."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def gallery(figures: Sequence[str]) -> str:
    """Small figures in as many columns as the screen has room for."""
    return f'<div class="gallery">{"".join(figures)}</div>'


def picture(pixels: NDArray[np.uint8], name: str, kind: str = "JPEG") -> str:
    """An image [h, w, 3] that the page holds itself, with its name for those who cannot see it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=85)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    height, width = pixels.shape[:2]
    return f'<img alt="{escape(name)}" width="{width}" height="{height}" src="{source}">'
