"""Write one HTML page with the pyramid panels of several images."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; background: #282828; color: #eee; margin: 2rem; }}
img {{ max-width: 100%; }} figure {{ margin: 2rem 0; }} figcaption {{ overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p>The columns are levels, from fine to coarse; the leftmost column shows all of them in the colors of the levels. The rows, from
the top: the norm of the feature vector in every cell, from the smallest of the map (black) to the largest; the objectness of the best
anchor in every cell; the anchors that are positive in training; the best proposals, at the level of their anchors; the same
proposals, at the level that the ROI head pools them from.</p>
{figures}
</html>
"""


def write_pyramid_page(path: Path, title: str, images: Sequence[Path]) -> None:
    """Write the page.

    Args:
        path: file to write.
        title: of the page.
        images: files in the folder of the page.
    """
    figures = [
        f'<figure><figcaption>{escape(image.stem)}</figcaption><img src="{escape(quote(image.name))}" alt="levels"></figure>'
        for image in images
    ]
    path.write_text(PAGE.format(title=escape(title), figures="\n".join(figures)), encoding="utf-8")
