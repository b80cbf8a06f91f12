"""Pictures that turn out to be unusable while a run goes on (`data.on_error=skip`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fpn_det.image_io import BadImage

NAME = "bad_files.txt"


class BadFiles:
    """Tells of each such file once, lists it in the run's folder, and ends the run when there are too many.

    The list belongs to the run, not to the process: all ranks write to it, and a resumed run goes on with it.

    Args:
        folder: of the run.
        num_images: in all parts of the data.
        max_fraction: how many of them may be unusable.
        log: writes a line.
    """

    def __init__(self, folder: Path, num_images: int, max_fraction: float, log: Callable[[str], None]) -> None:
        self._file = folder / NAME
        self._num_images = num_images
        self._max_fraction = max_fraction
        self._log = log

    def __call__(self, bad: BadImage) -> None:
        """Count one.

        Raises:
            ValueError: it is one too many.
        """
        known = {line.split("\t")[0] for line in listed(self._file.parent)}
        if str(bad.path) in known:
            return
        with self._file.open("a", encoding="utf-8") as file:  # a line at once, so that those of two ranks do not mix
            file.write(f"{bad.path}\t{bad}\n")
        self._log(f"left out: {bad}")
        count = len(known) + 1
        if count > self._max_fraction * self._num_images:
            raise ValueError(
                f"data.max_bad_fraction: expected at most {self._max_fraction:g} of {self._num_images} images to be unusable, "
                f"got {count} files, which {self._file} lists. Repair them, or allow for more."
            )


def listed(folder: Path) -> list[str]:
    """The lines of a run's list: file, tab, reason."""
    file = folder / NAME
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
