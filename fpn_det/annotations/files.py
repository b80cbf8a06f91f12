"""Files on disk: listings of folders, the file that a misspelled name means, and reading with limits."""

from __future__ import annotations

import codecs
import difflib
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MAX_TEXT_BYTES = 1 << 30  # of a text file; 20 million lines
MAX_NEAR_CANDIDATES = 2000  # names that are compared for a suggestion: difflib needs 0.1 ms for each

FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def describe_irregular(mode: int) -> str:
    """Name what a path with this `st_mode` is instead of a regular file; empty for a regular file."""
    return next((name for test, name in FILE_KINDS if test(mode)), "")


@contextmanager
def open_file(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> Iterator[BinaryIO]:
    """Open a regular file. Pipes and devices are refused, because reading them may never end.

    Raises:
        ValueError: the file does not exist, cannot be read, is not regular or too large.
    """
    try:
        status = os.stat(path)
        if irregular := describe_irregular(status.st_mode):
            raise ValueError(f"{path}: expected a regular file, got {irregular}. Check the path.")
        if status.st_size > max_bytes:
            raise ValueError(f"{path}: expected at most {max_bytes:,} bytes, got {status.st_size:,}. Split the file.")
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise ValueError(
            f"{path}: expected a file, got none that can be read: {error.strerror}. Check the path."
        ) from None


def read_file(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a file, see `open_file`."""
    with open_file(path, max_bytes) as file:
        return file.read()


def read_text(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the content of a UTF-8 file, or of a UTF-16 file with a byte order mark.

    Another encoding is refused, not guessed: a wrong guess changes names of classes and files.

    Raises:
        ValueError: the file cannot be read or is not text in one of these encodings.
    """
    content = read_file(path, max_bytes)
    if kind := describe_foreign(content):
        raise ValueError(f"{path}: expected text, got {kind}.")
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        wrong = f"the byte 0x{content[error.start]:02x} in line {line}"
        raise ValueError(f"{path}: expected UTF-8 text, got {wrong}. Save the file as UTF-8.") from None
    if "\0" in text:
        line = 1 + text[: text.index("\0")].count("\n")
        raise ValueError(f"{path}: expected UTF-8 text, got a zero byte in line {line}. Save the file as UTF-8.")
    return text


def describe_foreign(content: bytes) -> str:
    """Name content that a failed download or checkout leaves in place of data, with the remedy; empty for other content."""
    if content.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: fetch the data with `git lfs pull`"
    if content[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page: download the file again"
    return ""


def non_empty_lines(path: str | Path) -> list[str]:
    """Lines of a text file without surrounding blanks, empty lines left out."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def walk_files(folder: str | Path) -> Iterator[Path]:
    """Every file below a folder in the order of the names, following links; hidden files and folders are skipped."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name)


class FolderListings:
    """Names in folders, each folder read once: faster than one query per file."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}
        self._folded: dict[str, dict[str, str]] = {}
        self._by_stem: dict[str, dict[str, list[str]]] = {}

    def names(self, folder: str | Path) -> set[str]:
        """Names in a folder; empty if it cannot be read."""
        key = str(folder)
        if key not in self._names:
            try:
                self._names[key] = set(os.listdir(key or "."))
            except (OSError, ValueError):  # ValueError: a null byte or a lone surrogate in the name
                self._names[key] = set()
        return self._names[key]

    def has(self, path: str) -> bool:
        """True if the path exists in exactly this spelling."""
        parent, name = os.path.split(path)
        return name in self.names(parent)

    def with_stem(self, folder: str | Path, stem: str) -> list[str]:
        """Visible names in a folder that differ from `stem` by their ending only, sorted."""
        key = str(folder)
        if key not in self._by_stem:
            groups: dict[str, list[str]] = {}
            for name in sorted(self.names(folder)):
                if not name.startswith("."):
                    groups.setdefault(os.path.splitext(name)[0], []).append(name)
            self._by_stem[key] = groups
        return self._by_stem[key].get(stem, [])

    def find_renamed(self, path: str, folder: Path) -> str:
        """The one file below `folder` that a path from another system, with another root or letter case means; or ""."""
        parts = [part for part in str(path).removeprefix(f"{folder}{os.sep}").replace("\\", "/").split("/") if part]
        for start in range(len(parts)):
            *inner, name = parts[start:]
            parent = os.path.join(folder, *inner)
            if parent not in self._folded:
                self._folded[parent] = {}
                for other in sorted(self.names(parent)):
                    self._folded[parent].setdefault(fold_name(other), other)
            if fold_name(name) in self._folded[parent]:
                return os.path.join(parent, self._folded[parent][fold_name(name)])
        return ""

    def similar(self, path: str) -> list[str]:
        """Names in the folder of a path that resemble its last part."""
        parent, name = os.path.split(path)
        return near_matches(name, sorted(self.names(parent)))


def fold_name(name: str) -> str:
    """A file name without surrounding blanks, letter case and Unicode composition."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


def near_matches(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of `names` that resemble `name`, best first; letter case does not matter."""
    folded: dict[str, str] = {}
    for candidate in names:
        folded.setdefault(candidate.casefold(), candidate)
    if len(folded) > MAX_NEAR_CANDIDATES or len(name) > 255:
        return []
    return [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, count)]


def existing_path(path: str | Path, what: str) -> Path:
    """Return the absolute form of a path that must exist.

    Args:
        path: a file or folder; `~` is the home folder.
        what: name of the setting, for the message.

    Raises:
        ValueError: it does not exist; names the first missing part and up to three similar names.
    """
    wanted = Path(os.path.abspath(os.path.expanduser(path))) if "\0" not in str(path) else Path(str(path))
    if os.path.exists(wanted):
        return wanted
    missing = wanted
    while not os.path.exists(missing.parent):
        missing = missing.parent
    similar = near_matches(missing.name, sorted(FolderListings().names(missing.parent)))
    hint = f" Did you mean {' or '.join(str(missing.parent / name) for name in similar)}?" if similar else ""
    raise ValueError(f"{what}: expected a path that exists, got {wanted}; {missing} is not there.{hint}")
