"""Libraries of the extras."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino", "nncf": "openvino"}


def imported(name: str) -> Any:
    """A library of an extra.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"export: expected the library {name}, got none ({error}). Install it: pip install 'fpn_det[{EXTRAS[name]}]'."
        ) from None


def is_installed(name: str) -> bool:
    """True if a library can be imported; it is not."""
    return importlib.util.find_spec(name) is not None
