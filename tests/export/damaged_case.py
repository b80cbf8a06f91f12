"""Damaged and foreign files, and wrong inputs, as a program: python tests/export/damaged_case.py <format> <folder>.

Prints, as JSON, what `ExportedFile` says about each. In a process of its own: openvino keeps handlers on the streams of its process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from fpn_det.config import EXPORTED
from fpn_det.export.exported import ExportedFile
from fpn_det.export.graph import LEAST_SIDE
from fpn_det.export.metadata import Metadata
from fpn_det.export.writing import Format, write

METADATA = Metadata(class_names=["a"], category_ids=[1])


@dataclass(frozen=True)
class Foreign:
    """Metadata of other software."""

    precision: str = "fp32"

    def texts(self) -> dict[str, str]:
        return {"names": "{0: 'person'}"}


class Corners(nn.Module):
    """A model with the inputs and outputs of a detector, which finds the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1000))

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        boxes = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], dim=1)[:, None] * self.scale[0]
        scores = images.float().mean(dim=(1, 2, 3))[:, None] * self.scale.mean() / 255
        labels = torch.zeros_like(sizes[:, :1])
        return boxes, scores, labels, scores >= 0, torch.ones_like(sizes[:, 0])


def write_corners(format: Format, path: Path, metadata: Any) -> None:
    images, sizes = torch.zeros(2, 100, 110, 3, dtype=torch.uint8), torch.tensor([[100, 110]] * 2)
    shapes = ({axis: Dim(f"side{axis}", min=1, max=9999) for axis in range(3)}, {0: Dim("side0", min=1, max=9999)})
    write(torch.export.export(Corners(), (images, sizes), dynamic_shapes=shapes), format, path, metadata)


def said(action: Callable[[], object]) -> str | None:
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


def main(format: Format, folder: Path) -> None:
    """Print what is said about damaged and foreign files of a format, and about inputs that its files do not take."""
    good, bad = (folder / f"{name}{EXPORTED[format]}" for name in ("good", "bad"))
    write_corners(format, good, METADATA)
    files = {file.suffix: file.read_bytes() for file in folder.iterdir()}
    messages = {}

    def open_with(name: str, **changed: bytes | None) -> None:
        for suffix, content in files.items():
            content = changed.get(suffix[1:], content)
            target = bad.with_suffix(suffix)
            target.unlink(missing_ok=True)
            if content is not None:
                target.write_bytes(content)
        messages[name] = said(lambda: ExportedFile(bad))

    for suffix, content in files.items():
        kind = suffix[1:]
        open_with(f"{kind}: empty", **{kind: b""})
        open_with(f"{kind}: half", **{kind: content[: len(content) // 2]})
        open_with(f"{kind}: short", **{kind: content[:-100]})
    open_with("text", **{bad.suffix[1:]: b"no model\n"})
    open_with("zeros", **{bad.suffix[1:]: bytes(1000)})
    if ".bin" in files:
        open_with("bin: none", bin=None)
    for name, metadata in {"stranger": Foreign(), "other type": replace(METADATA, category_ids=["one"])}.items():
        write_corners(format, bad, metadata)
        messages[name] = said(lambda: ExportedFile(bad))
    file = ExportedFile(good)
    images, sizes = torch.zeros(2, 100, 110, 3, dtype=torch.uint8), torch.tensor([[100, 110]] * 2)
    messages["empty batch"] = said(lambda: file(images[:0], sizes[:0]))
    messages["float images"] = said(lambda: file(images.float(), sizes))
    messages["other layout"] = said(lambda: file(images.permute(0, 3, 1, 2), sizes))
    messages["float sizes"] = said(lambda: file(images, sizes.float()))
    messages["sizes of one"] = said(lambda: file(images, sizes[:1]))
    pixel = file(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8), torch.tensor([[1, 1]]))
    assert pixel.boxes.tolist() == [[[0, 0, 1, 1]]]
    assert abs(pixel.scores.item() * LEAST_SIDE**2 - 1) < 1e-4  # the rest of the canvas is padding
    print(json.dumps(messages))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]
