"""Read YAML that may come from a stranger: plain values only, in bounded time and memory.

Aliases are refused, because nested ones expand without bound, and so are deep nesting and large files. Tags that would
make objects are refused by the safe loader itself.
"""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

MAX_BYTES = 4 << 20
MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases, with a limit on nesting."""

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


def load_yaml(text: str, where: str) -> Any:
    """The plain value that a YAML document holds.

    Args:
        where: the file or setting, for messages.

    Raises:
        ValueError: the text is not YAML, or exceeds the limits.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{where}: expected at most {MAX_BYTES >> 20} MiB of YAML, got {len(text) >> 20} MiB.")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: expected plain YAML, got text that cannot be read: {reason}.") from None
