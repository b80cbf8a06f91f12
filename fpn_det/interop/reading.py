"""Read weight files from untrusted sources without executing code in them.

A pickle is a program. torch's `weights_only` and the unpickler below execute only what builds tensors, arrays and plain
containers. Training files also hold other things (settings, histories, numpy scalars): each of their names is bound to
one class that does nothing, and what contains it is dropped and listed.
"""

from __future__ import annotations

import collections
import mmap
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpn_det.weight_files import SAFETENSORS, check_archive, read_safetensors, remedy_for

TORCH_MAGIC = bytes.fromhex("80028a0a6cfc9c46f920")  # first bytes of torch files before they were zip archives
# Modules of the standard library that a file of weights may name.
DATA_MODULES = {
    "_codecs",
    "argparse",
    "builtins",
    "collections",
    "copyreg",
    "datetime",
    "decimal",
    "enum",
    "pathlib",
    "uuid",
}
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names of Python 2, which old pickles use
DATA_BUILTINS = {"bytearray", "complex", "frozenset", "getattr", "object", "range", "set", "slice"}


@dataclass(frozen=True)
class WeightFile:
    """Tensors of a file under their own names, and the metadata of the file."""

    path: Path
    state: dict[str, Tensor]
    class_names: tuple[str, ...] | None = None
    dropped: dict[str, str] = field(default_factory=dict)  # part of the file -> reason
    config: str | None = None  # YAML text of the settings; of our own checkpoints, as what follows
    category_ids: tuple[int, ...] = ()  # of the classes
    score_thresholds: dict[str, Any] | None = None  # found by the evaluation; not checked


class Inert(list):
    """Inert placeholder for an object of a class that is not loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    __hash__ = object.__hash__  # type: ignore[assignment]


def read_weights(path: str | Path) -> WeightFile:
    """Read a file written by torchvision, detectron2, mmdetection or fpn_det, also as safetensors.

    Raises:
        ValueError: there is no such file, it cannot be read, it holds code, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of weights, got no such file.")
    with path.open("rb") as file:
        start = file.read(len(TORCH_MAGIC))
    is_torch = zipfile.is_zipfile(path) or start == TORCH_MAGIC
    try:
        if path.suffix == SAFETENSORS:
            content, foreign = _read_safetensors(path), list[str]()
        else:
            content, foreign = _read_torch(path) if is_torch else (_read_pickle(path), [])
        dropped = {where: f"not plain data (the file names {', '.join(foreign)})" for where in _inert_parts(content)}
    except Exception as error:  # of any kind: a damaged pickle may raise anything
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: expected"):
            raise
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: expected a file of weights, got one that is damaged or holds more than that ({reason}). "
            f"{remedy_for(path)}"
        ) from None
    return _find_weights(path, content, dropped)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Content of a safetensors file; of one with a description, as a checkpoint has it."""
    tensors, about = read_safetensors(path)
    return {"format": "fpn_det checkpoint", "model": tensors} | about if about else dict(tensors)


def _read_torch(path: Path) -> tuple[Any, list[str]]:
    """Content of a file made by torch.save, and the names of the classes that were not loaded."""
    if zipfile.is_zipfile(path):
        check_archive(path)
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    else:
        foreign = sorted(_old_foreign_names(path))
    for name in foreign:
        _refuse_code(path, name)
    with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
        return torch.load(path, map_location="cpu", weights_only=True), foreign


def _old_foreign_names(path: Path) -> set[str]:
    """Names that a file of the old format refers to, except torch's own; found by parsing, without execution."""
    names = set()
    with path.open("rb") as file:
        for _ in range(4):  # magic number, version, machine, content
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    module, name = str(argument).split(" ")
                    names.add(f"{OLD_MODULES.get(module, module)}.{name}")
    return {name for name in names if not name.startswith(("torch.", "collections.OrderedDict"))}


def _refuse_code(path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    package = module.split(".")[0]
    is_data = package in DATA_MODULES and (package != "builtins" or attribute in DATA_BUILTINS)
    if package in sys.stdlib_module_names and not is_data:
        raise ValueError(
            f"{path}: expected weights, got a file that calls {name}. Nothing of it was run; do not trust it."
        )


def _latin1(text: str, encoding: str) -> bytes:
    """Replacement for `codecs.encode`, by which pickles of old protocols write bytes; refuses other encodings."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that admits numpy arrays, numpy scalars and plain containers."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        package, _, rest = module.partition(".")
        if (
            package == "numpy"
            and rest in ("core.multiarray", "_core.multiarray")
            and name in ("_reconstruct", "scalar")
        ):
            example = np.empty(0) if name == "_reconstruct" else np.float64(0)
            return example.__reduce__()[0]  # its module differs between numpy versions
        admitted = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) in admitted:
            return admitted[module, name]
        raise ValueError(
            f"{self.path}: expected arrays and plain containers, got a pickle that refers to {module}.{name}. "
            f"Nothing of it was run; do not trust it."
        )


def _check_pickle(path: Path) -> None:
    """Refuse a pickle that makes the unpickler allocate more than its file justifies. Nothing is executed.

    Python's unpickler allocates a table up to the largest index of a PUT instruction, whatever the number of objects.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for count, (code, argument, _) in enumerate(pickletools.genops(content)):  # type: ignore[arg-type]
            if "PUT" in code.name and isinstance(argument, int) and argument > count:
                raise ValueError(f"{path}: expected a file of weights, got a pickle with an index of {argument:,}.")


def _read_pickle(path: Path) -> Any:
    _check_pickle(path)
    with path.open("rb") as file:
        return _ArrayUnpickler(path, file).load()


def _inert_parts(content: Any, where: str = "") -> Iterator[str]:
    """Remove the parts of nested dictionaries that hold an Inert, and return their dotted names. Lists are removed whole."""
    if not isinstance(content, dict):
        return
    for key in list(content):
        name = f"{where}.{key}" if where else str(key)
        if isinstance(content[key], dict) and not isinstance(key, Inert):
            yield from _inert_parts(content[key], name)
        elif isinstance(key, Inert) or _holds_inert(content[key]):
            del content[key]
            yield name


def _holds_inert(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_inert(item) for pair in value.items() for item in pair)
    if isinstance(value, Inert):
        return True
    return isinstance(value, list | tuple | set | frozenset) and any(map(_holds_inert, value))


def _find_weights(path: Path, content: Any, dropped: dict[str, str]) -> WeightFile:
    """Unwrap what each project wraps around its state dict."""
    if not isinstance(content, dict):
        what = "an object of a foreign class" if isinstance(content, Inert) else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected a state dict or a checkpoint, got {what}.")
    keys: tuple[str, ...] = ("model", "state_dict", "model_state", "blobs")
    class_names = None
    ours: dict[str, Any] = {}
    if str(content.get("format", "")).startswith("fpn_det checkpoint"):
        keys = ("ema", "model") if content.get("ema") else ("model",)
        names = content.get("class_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: expected class names in the checkpoint, got {type(names).__name__}.")
        class_names = tuple(names)
        ids = content.get("category_ids")
        is_known = isinstance(ids, list) and len(ids) == len(names) and all(type(each) is int for each in ids)
        ours = {
            "config": content.get("config"),
            "category_ids": tuple(ids or ()) if is_known else (),
            "score_thresholds": content.get("score_thresholds"),
        }
    elif isinstance(content.get("meta"), dict):  # mmdetection
        described = content["meta"].get("dataset_meta") or content["meta"]
        names = described.get("classes") or described.get("CLASSES")
        class_names = tuple(map(str, names)) if isinstance(names, list | tuple) else None
    chosen = next((key for key in keys if isinstance(content.get(key), dict)), None)
    if chosen is not None:
        dropped = dropped | {str(key): _reason(str(key), chosen) for key in content if key != chosen}
        content = content[chosen]
    state = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            _check_size(path, str(key), value.nbytes)
            value = torch.from_numpy(value.copy())
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and not value.is_quantized:
            _check_size(path, str(key), value.numel() * value.element_size())
            state[str(key).removeprefix("module.")] = value  # DataParallel adds the prefix `module.`
        else:
            dropped = dropped | {str(key): f"a {type(value).__name__}, not a tensor"}
    if not state:
        listed = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
        raise ValueError(f"{path}: expected weights, got none ({listed or 'the file is empty'}).")
    return WeightFile(path, state, class_names, dropped, **ours)


def _check_size(path: Path, name: str, num_bytes: int) -> None:
    """Refuse a tensor that is larger than its file, such as one whose elements share memory."""
    if num_bytes > path.stat().st_size:
        raise ValueError(
            f"{path}: expected weights, got {num_bytes:,} bytes of {name} in a smaller file. Do not trust it."
        )


def _reason(key: str, chosen: str) -> str:
    if key == "ema_state_dict":
        return "the weights of the last step; state_dict holds their moving average"
    if key == "model" and chosen == "ema":
        return "the weights of the last step; ema holds their moving average"
    return "not weights of the model"
