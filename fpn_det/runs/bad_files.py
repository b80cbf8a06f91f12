"""List of the images of a run that could not be read (`data.on_error=skip`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fpn_det.image_io import BadImage

NAME = "bad_files.txt"


class BadFiles:
    """Callback that logs each bad image once, appends it to `bad_files.txt`, and ends the run if there are too many.

    All ranks share the file, and a resumed run continues it.

    Args:
        folder: run folder.
        num_images: number of images in all splits.
        max_fraction: of them that may be bad, in [0, 1].
        log: called with a line of text.
    """

    def __init__(self, folder: Path, num_images: int, max_fraction: float, log: Callable[[str], None]) -> None:
        self._file = folder / NAME
        self._num_images = num_images
        self._max_fraction = max_fraction
        self._log = log

    def __call__(self, bad: BadImage) -> None:
        """Record a bad image.

        Raises:
            ValueError: more than `max_fraction` of the images are bad.
        """
        known = {line.split("\t")[0] for line in read_bad_files(self._file.parent)}
        if str(bad.path) in known:
            return
        with self._file.open("a", encoding="utf-8") as file:  # one write per line, so that ranks do not interleave
            file.write(f"{bad.path}\t{bad}\n")
        self._log(f"skipped: {bad}")
        count = len(known) + 1
        if count > self._max_fraction * self._num_images:
            raise ValueError(
                f"data.max_bad_fraction: expected at most {self._max_fraction:g} of {self._num_images} images to be bad, "
                f"got {count}, listed in {self._file}. Repair them, or raise data.max_bad_fraction."
            )


def read_bad_files(folder: Path) -> list[str]:
    """Return the lines of `bad_files.txt`: path, tab, reason."""
    file = folder / NAME
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
