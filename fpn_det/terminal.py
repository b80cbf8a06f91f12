"""Text for terminals and logs: names from files may hold escape sequences, and a terminal may not be UTF-8."""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

PLAIN_WIDTH = 80  # characters of a line in pipes and files; a terminal states its own
COMMANDS = ("fpn-det ", "tensorboard --")  # in a line that is to be copied
GAP = "..."  # in place of the middle of a shortened text
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


def is_terminal(stream: IO[str]) -> bool:
    """True for a terminal. The standard output of a notebook's kernel claims to be one."""
    return stream.isatty() and not Console().is_jupyter


class SafeConsole(Console):
    """A rich Console that prints text of files without executing their escape sequences.

    A notebook gets lines as a pipe does: rich's own output there is HTML, which never reaches the console's file, and
    each state of a progress bar would stay. For the same reason FORCE_COLOR, which notebooks set, makes no pipe a terminal.
    """

    def __init__(self, file: IO[str] | None = None, stderr: bool = False, **options: Any) -> None:
        stream = file or (sys.stderr if stderr else sys.stdout)
        as_stated = {"force_jupyter": False, "force_terminal": is_terminal(stream), **options}
        super().__init__(file=file, stderr=stderr, **as_stated)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def standard_console() -> SafeConsole:
    """Return the console of the standard output: as wide as the terminal, `PLAIN_WIDTH` in a pipe or file."""
    return SafeConsole(file=sys.stdout, width=None if is_terminal(sys.stdout) else PLAIN_WIDTH)


def say(console: Console, text: str) -> None:
    """Print lines of text. A terminal gets them broken between words, except commands, which are to be copied."""
    if console.is_terminal:
        text = "\n".join(_broken(line, console.width) for line in text.split("\n"))
    console.print(text, markup=False, soft_wrap=True)


def _broken(line: str, width: int) -> str:
    if cell_len(line) <= width or any(command in line for command in COMMANDS):
        return line
    indent = line[: len(line) - len(line.lstrip())] + "  "
    lines = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def shown_path(path: Path) -> Path:
    """Return the path relative to the working directory if it is inside, else absolute."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def shorten(text: str, width: int) -> str:
    """Return `text` in at most `width` terminal cells, without its middle. The file name of a path is kept whole if it fits."""
    if cell_len(text) <= width:
        return text
    kept = width - len(GAP)
    if kept < 2:
        return set_cell_size(text, width)
    tail = kept - kept // 4
    name = cell_len(text[text.rfind("/") :]) if "/" in text else 0
    if tail < name <= kept:
        tail = name
    return f"{set_cell_size(text, kept - tail)}{GAP}{set_cell_size(text[::-1], tail)[::-1]}"


@dataclass(frozen=True)
class Shortened:
    """A text or path on one line, shortened in the middle to the width that a table leaves it."""

    text: str | Path
    least: int = 16  # characters that a table does not take away

    def _line(self) -> str:
        text = str(shown_path(self.text)) if isinstance(self.text, Path) else self.text
        return printable(text).replace("\n", "\\n").replace("\t", "\\t")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = cell_len(self._line())
        return Measurement(min(width, self.least), width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(shorten(self._line(), options.max_width), no_wrap=True, overflow="crop", justify=options.justify)


def replace_unencodable(stream: IO[Any] | None) -> None:
    """Let a text stream print `?` for characters that its encoding lacks, in place of an error."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):
            stream.reconfigure(errors="replace")
