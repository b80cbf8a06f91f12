"""Read YAML that may come from a stranger: plain values only, in bounded time and memory.

Aliases are refused, because nested ones expand without bound, and so are deep nesting and large files. Tags that would
make objects are refused by the safe loader itself.
"""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

MAX_BYTES = 4 << 20
MAX_DEPTH = 50


class _Limits(yaml.composer.Composer):
    """Mix-in for a loader: no aliases, and a limit on nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels of nesting")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Loader(_Limits, yaml.SafeLoader):
    """The safe loader with limits."""


class _StringLoader(_Limits, yaml.BaseLoader):
    """A loader with limits that leaves every scalar a string, and refuses a key that comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"a key comes twice, line {node.start_mark.line + 1} and following")
        return mapping


def load_yaml(text: str, where: str, as_strings: bool = False) -> Any:
    """Return the plain value that a YAML document holds.

    Args:
        text: the document.
        where: the file or setting, for messages.
        as_strings: leave every scalar a string, so `no`, `1e3`, `012` and dates stay what they are.

    Raises:
        ValueError: the text is not YAML, or exceeds the limits.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{where}: expected at most {MAX_BYTES >> 20} MiB of YAML, got {len(text) >> 20} MiB.")
    try:
        return yaml.load(text, _StringLoader if as_strings else _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: expected plain YAML, got text that cannot be read: {reason}.") from None
