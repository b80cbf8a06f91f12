"""Write weights in the file formats of other projects."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpn_det.interop.naming import Project


def write_weights(
    path: Path, state: Mapping[str, Tensor], project: Project, class_names: Sequence[str] | None = None
) -> None:
    """Write a state dict in the names of `project`, wrapped as that project wraps it.

    torchvision: the state dict alone. detectron2: under `model`; as numpy arrays if the file is called .pkl, like its
    model zoo's. mmdetection: under `state_dict`, with the class names in `meta`.

    Raises:
        ValueError: the path does not go with the project.
    """
    tensors = OrderedDict((name, value.detach().cpu().contiguous()) for name, value in state.items())
    if path.suffix == ".pkl" and project != "detectron2":
        raise ValueError(
            f"{path}: expected the name of a torch file (.pth) for {project}, got a pickle's. Only detectron2 reads those."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    content: Any = tensors
    if project == "detectron2":
        content = {"model": tensors}
    elif project == "mmdet":
        content = {
            "meta": {"dataset_meta": {"classes": tuple(class_names)}} if class_names else {},
            "state_dict": tensors,
        }
    with path.open("wb") as file:  # torch hides the cause if it cannot open a file
        if path.suffix == ".pkl":
            arrays = {name: value.numpy() for name, value in tensors.items()}
            pickle.dump({"model": arrays, "__author__": "fpn_det"}, file)
        else:
            torch.save(content, file)
