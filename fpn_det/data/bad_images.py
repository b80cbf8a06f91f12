"""Bad images: files that cannot be decoded, or whose size is not the annotated one (`image_io.BadImage`).

With `data.check`, every file is checked before the run, and `data.on_error` decides about it there. A file that turns out
to be bad during the run

- ends the run under `on_error=fail` and `fix`;
- under `on_error=skip`, is replaced by another image in training (`load_or_replace`) and left out in evaluation
  (`load_available`). It is sent to the main process with its batch and reported to the `on_bad_image` callback, which
  logs and lists it and enforces `data.max_bad_fraction` (`runs.bad_files.BadFiles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from fpn_det.data.sampling import Key
from fpn_det.image_io import BadImage

T = TypeVar("T")
OnBadImage = Callable[[BadImage], None]  # called for each image that was replaced or left out

MAX_REPLACEMENTS = 10  # of one image, in a row


def load_or_replace(load: Callable[[Key], T], key: Key, num_images: int, seed: int) -> tuple[T, list[BadImage]]:
    """Load an image, or another one in its place if it is bad.

    Replacements are drawn by (seed, epoch, row, attempt), so they do not depend on workers or ranks.

    Args:
        load: loads an image.
        key: of the image.
        num_images: in the data set.
        seed: of the draw.

    Returns:
        The loaded image and the bad ones that it replaces.

    Raises:
        ValueError: so many images in a row are bad that the data set must be broken.
    """
    wanted = key
    bad: list[BadImage] = []
    while True:
        try:
            return load(key), bad
        except BadImage as error:
            bad.append(error)
            if len(bad) > MAX_REPLACEMENTS:
                raise ValueError(
                    f"{error} It is the last of {len(bad)} randomly drawn images, all of which are bad. "
                    "Run fpn-det check-data."
                ) from None
            random = np.random.default_rng((seed, wanted.epoch, wanted.row, len(bad)))
            key = wanted._replace(row=int(random.integers(num_images)))


def load_available(load: Callable[[Key], T], keys: Sequence[Key]) -> tuple[list[T], list[BadImage]]:
    """Load the images of a batch, leaving out bad ones.

    Returns:
        The loaded images and the bad ones.
    """
    loaded: list[T] = []
    bad: list[BadImage] = []
    for key in keys:
        try:
            loaded.append(load(key))
        except BadImage as error:
            bad.append(error)
    return loaded, bad
