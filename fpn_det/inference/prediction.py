"""The result of detection on one image."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fpn_det.inference.images import ImageInput, read_display
from fpn_det.visualization.panels import SIDE, draw_boxes

NOTEBOOK_SIDE = 960  # px, longer side of the largest image that a notebook shows


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """Detections of one image, best first. Tensors are on the CPU; boxes are in px of the upright image.

    In a notebook it is shown as the image with its detections.
    """

    boxes: Tensor  # f32 [D, 4] xyxy, original frame
    scores: Tensor  # f32 [D] in [0, 1]
    labels: Tensor  # i64 [D] in [0, K)
    class_names: tuple[str, ...]  # [K]
    size: tuple[int, int]  # (h, w) in the original frame
    path: Path | None = None  # of the image or video file; None for an array or a PIL image
    frame: int | None = None  # of the video, from 0 on; None for an image
    image_id: int = 1  # in `to_coco`; images are numbered from 1 on, unless their ids are known
    category_ids: tuple[int, ...] = ()  # [K], in `to_coco`; empty = label + 1
    _read: Callable[[], np.ndarray] | None = None  # decodes the image

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        counts = Counter(self.names).most_common()
        found = ", ".join(f"{count} {name}" for name, count in counts) or "nothing"
        where = f"{self.path}, " if self.path else ""
        where += "" if self.frame is None else f"frame {self.frame}, "
        return f"Prediction({where}{self.size[1]} x {self.size[0]} px: {found})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels, [D]."""
        return tuple(self.class_names[label] for label in self.labels.tolist())

    def to_coco(self) -> list[dict[str, Any]]:
        """Rows of a COCO results file: image_id, category_id, bbox (x, y, width, height) and score. Nothing is rounded."""
        boxes = self.boxes.double()
        boxes[:, 2:] -= boxes[:, :2]
        ids = self.category_ids or range(1, len(self.class_names) + 1)
        return [
            {"image_id": self.image_id, "category_id": ids[label], "bbox": box, "score": score}
            for box, score, label in zip(boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        ]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the columns file, class, score, x1, y1, x2, y2; for a video, frame follows file.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _import("pandas", "to_pandas")
        table = pandas.DataFrame(self.boxes.numpy(), columns=["x1", "y1", "x2", "y2"])
        table.insert(0, "file", str(self.path or ""))
        table.insert(1, "class", self.names)
        table.insert(2, "score", self.scores.numpy())
        if self.frame is not None:
            table.insert(1, "frame", self.frame)
        return table

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`.

        Raises:
            ImportError: supervision is not installed.
        """
        supervision = _import("supervision", "to_supervision")
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: ImageInput, side: int | None = None) -> Image.Image:
        """The image with its detections drawn.

        Args:
            image: the image, or another one of the same size: path, PIL image or array.
            side: longer side of the result, px; None keeps the size of the image.

        Raises:
            ValueError: the image cannot be read, or has another size.
        """
        pixels = read_display(image)
        if pixels.shape[:2] != self.size:
            expected, got = (f"{width} x {height} px" for height, width in (self.size, pixels.shape[:2]))
            raise ValueError(f"draw: expected the image that was predicted, of {expected}, got one of {got}.")
        texts = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)]
        drawn = draw_boxes(pixels, self.boxes.numpy(), self.labels.tolist(), texts, side=side or max(self.size))
        return Image.fromarray(drawn)

    def plot(self, side: int | None = None) -> Image.Image:
        """The predicted image with its detections drawn. Its file is read again.

        Args:
            side: see `draw`.

        Raises:
            ValueError: the image cannot be read any more.
        """
        if self._read is None:
            raise ValueError("plot: expected a prediction that knows its image, got one without. Use draw(image).")
        return self.draw(self._read(), side)

    def _repr_png_(self) -> bytes | None:
        try:
            picture = self.plot(side=min(max(*self.size, SIDE), NOTEBOOK_SIDE))
        except ValueError:  # the file is gone
            return None
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()


def _import(library: str, method: str) -> Any:
    try:
        return __import__(library)
    except ImportError as error:
        raise ImportError(
            f"{method}: expected {library}, which is not installed. Install it: pip install {library}."
        ) from error
