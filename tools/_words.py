"""What tools with settings of their own take from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`name=value` words: those with a dotted name as they stand, which are settings of a run; of the others, the values.

    Raises:
        ValueError: a word gives no value.
    """
    for word in words:
        if "=" not in word:
            raise ValueError(f"command line: expected name=value, got '{word}'. Say {word}=...")
    overrides = [word for word in words if "." in word.split("=")[0]]
    given = OmegaConf.to_container(OmegaConf.from_cli([word for word in words if word not in overrides]))
    assert isinstance(given, dict)
    return overrides, {str(name): value for name, value in given.items()}
