"""Settings of one split of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpn_det.annotations.check_objects import FlaggedObjects
from fpn_det.annotations.findings import OnError
from fpn_det.annotations.image_inspection import ImageInspector
from fpn_det.annotations.reading import CheckedDataset, Format, check_raw, load_raw


@dataclass(frozen=True)
class SplitConfig:
    """One split of a data set."""

    images: str | list[str] | None = (
        None  # folder, or one for each of the annotations; null = where the format has them
    )
    annotations: str | list[str] | None = None  # file or folder, as the format needs; several are concatenated
    format: Format | None = None  # coco, voc, yolo, csv; null = detected

    def load(
        self,
        split: str,
        *,
        class_names: Sequence[str] | None = None,
        subset: bool = False,
        on_error: OnError = "fail",
        flagged_objects: FlaggedObjects = "crowd",
        inspect: ImageInspector | None = None,
    ) -> CheckedDataset:
        """Read and check the split. Faults are returned; `findings.raise_for_faults` refuses them.

        Args:
            split: its name, for messages and for formats with several splits in a folder.
            class_names: the classes and their order; None takes them from the files.
            subset: the files may hold more classes than `class_names`.
            on_error: repair faults, or leave out what is faulty.
            flagged_objects: what to make of objects flagged as difficult or ignored.
            inspect: inspects the image files; None trusts the annotations.

        Raises:
            ValueError: the split is not set, or a file cannot be read at all.
        """
        if self.annotations is None:
            raise ValueError(
                f"data.{split}: expected images and annotations, got none. "
                f"Set data.{split}.images and data.{split}.annotations."
            )
        raw = load_raw(self.annotations, self.images, self.format, split)
        return check_raw(raw, class_names, subset, on_error, inspect, flagged_objects)
