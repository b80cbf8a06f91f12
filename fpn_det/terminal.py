"""Text for terminals and logs: names from files may hold escape sequences, and a terminal may not be UTF-8."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

LAYOUT = "\n\t"  # control characters that text may hold
# Characters that reorder or hide the text around them.
INVISIBLE = {*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC)}


def printable(text: str) -> str:
    r"""`text` with control characters, lone surrogates and characters that change the direction of text as escapes.

    Newlines and tabs stay. `printable("a\x1b[2J")` is `a\x1b[2J` with a backslash in place of the escape character.
    """
    if text.isprintable():
        return text
    return "".join(char if char in LAYOUT or not _is_harmful(char) else _escaped(char) for char in text)


def _is_harmful(char: str) -> bool:
    code = ord(char)
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in INVISIBLE


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


class SafeConsole(Console):
    """A rich Console that prints text of files without executing their escape sequences."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def replace_unencodable(stream: IO[Any] | None) -> None:
    """Let a text stream print `?` for characters that its encoding lacks, in place of an error."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):
            stream.reconfigure(errors="replace")
