"""Look into a detector: python tools/show_pyramid.py run=<folder> [image=<file>] [count=4] [setting=value ...].

For each picture, level by level: the feature maps, where the RPN sees objects, the anchors that matched one, the best
proposals, and the levels that these are pooled from. Leaves a PNG for each, and index.html with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from fpn_det.cli.launch import argument, launch
from fpn_det.config import EvalConfig
from fpn_det.models.detector import Detector
from fpn_det.runs.checkpoint import fill_model, folder_of_run, named_checkpoint
from fpn_det.runs.log import shown_path
from fpn_det.runtime import pick_device
from fpn_det.schema import Count
from fpn_det.structures import Batch
from fpn_det.visualization.panels import some_images
from fpn_det.visualization.pyramid_panels import draw_levels, read_levels

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; background: #282828; color: #eee; margin: 2rem; }}
img {{ max-width: 100%; }} figure {{ margin: 2rem 0; }}
</style>
<h1>{title}</h1>
<p>Columns are levels, fine to coarse; at the left all of them together, in the colors of the levels. Rows, from above:
the length of the feature vector in every cell, from the map's smallest (black) to its largest; the objectness of the best anchor of
every cell; the anchors that would stand for an object in training; the best proposals, at the level of their anchors;
the same, at the level that the second stage pools them from.</p>
{figures}
</html>
"""


@dataclass(frozen=True, kw_only=True)
class ShowSettings(EvalConfig):
    """Those of the run or checkpoint, and what to show of it."""

    image: str | None = None  # file; null = some of the split
    count: Count = 4  # how many of the split
    output: str | None = None  # folder; null = pyramid/ in the run's


def show_pyramid(settings: ShowSettings, words: Sequence[str]) -> None:
    """A picture for each image, and a page with all of them."""
    path, state = named_checkpoint(settings.run, settings.checkpoint)
    device = pick_device(settings.device)
    model = settings.build_model(len(state["class_names"]))
    fill_model(model, state, str(path), settings.weights)
    model.to(device)
    folder = Path(settings.output) if settings.output else folder_of_run(path) / "pyramid"
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, batch in batches(settings, model, state["class_names"]):
        Image.fromarray(draw_levels(read_levels(model, batch.to(device)), batch)).save(folder / f"{name}.png")
        figures.append(
            f'<figure><figcaption>{escape(name)}</figcaption><img src="{escape(name)}.png" alt="levels"></figure>'
        )
    page = folder / "index.html"
    page.write_text(PAGE.format(title=escape(str(path)), figures="\n".join(figures)))
    print(f"written: {shown_path(page)}")


def batches(settings: ShowSettings, model: Detector, class_names: list[str]) -> Iterator[tuple[str, Batch]]:
    """The pictures as the model gets them, with their names."""
    device = pick_device(settings.device)
    if settings.image:
        yield (
            Path(settings.image).stem,
            settings.build_predictor(model, class_names, device).batch_of([settings.image]),
        )
        return
    annotations = settings.data.read_split(settings.split, class_names, settings.seed)
    rows = some_images(annotations, settings.count)
    for batch in settings.single_images(annotations, rows, model.stride, device):
        yield annotations.path(rows[int(batch.indices[0])]).stem, batch


if __name__ == "__main__":
    launch(
        show_pyramid,
        ShowSettings,
        "show_pyramid",
        lambda: named_checkpoint(argument("run"), argument("checkpoint"))[1]["config"],
    )
