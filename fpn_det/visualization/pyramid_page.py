"""Write one HTML page with the pyramid panels of several images."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from fpn_det.pages.document import figure, hint, write_document

ROWS = (
    "The columns are levels, from fine to coarse; the leftmost column shows all of them in the colors of the levels. The rows, from "
    "the top: the norm of the feature vector in every cell, from the smallest of the map (black) to the largest; the objectness of "
    "the best anchor in every cell; the anchors that are positive in training, if the image has objects; the best proposals, at the "
    "level of their anchors; the same proposals, at the level that the ROI head pools them from; the detections, at the level that "
    "a box of their size is pooled from, leftmost in the colors of their classes."
)


def write_pyramid_page(path: Path, title: str, images: Sequence[Path]) -> None:
    """Write the page.

    Args:
        path: file to write.
        title: of the page.
        images: files below the folder of the page.
    """
    names = [image.relative_to(path.parent) for image in images]
    figures = [figure(_linked(name), escape(name.with_suffix("").as_posix())) for name in names]
    write_document(path, title, f"<h1>{escape(title)}</h1>{hint(ROWS)}{''.join(figures)}")


def _linked(name: Path) -> str:
    """A picture that a click opens at full size: a phone shows its titles too small."""
    source = escape(quote(name.as_posix()))
    return f'<a href="{source}"><img src="{source}" alt="levels of {escape(name.stem)}"></a>'
