"""Draw the inside of a trained detector, level by level.

For each image: the feature maps, the objectness of the RPN, the anchors that match an object, the best proposals,
the levels that these are pooled from, and the detections. Writes a PNG file for each image, and index.html with all of them.

Examples:
  fpn-det show-pyramid run=runs/demo
  fpn-det show-pyramid run=runs/demo image=photo.jpg output=shown
  fpn-det show-pyramid checkpoint=model.pt count=8 split=test
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fpn_det.cli.eval import saved_settings
from fpn_det.cli.launch import launch
from fpn_det.config import EvalConfig
from fpn_det.inference.folder import drawing_names
from fpn_det.inference.predictor import build_predictor
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.runs.checkpoint import fill_model, find_checkpoint, run_folder_of
from fpn_det.runtime import pick_device
from fpn_det.schema import Count
from fpn_det.structures import Batch, ScoreThresholds
from fpn_det.terminal import shown_path
from fpn_det.visualization.panels import pick_images
from fpn_det.visualization.pyramid_page import write_pyramid_page
from fpn_det.visualization.pyramid_panels import draw_pyramid, inspect_pyramid


@dataclass(frozen=True, kw_only=True)
class ShowPyramidConfig(EvalConfig):
    """Settings of the run or checkpoint, and which images to draw."""

    image: str | None = None  # file; null = images of the split
    count: Count = 4  # number of images of the split
    output: str | None = None  # folder of the images; null = pyramid/ in the folder of the run


def main() -> None:
    """Draw with the detector that the command line names."""
    launch(show_pyramid, ShowPyramidConfig, "show_pyramid", saved_settings)


def show_pyramid(config: ShowPyramidConfig, words: Sequence[str]) -> None:
    """Write the panel of each image, and the page with all of them.

    Raises:
        ValueError: views or tiles are asked for, whose inside is not drawn.
    """
    if config.tta != Views():
        raise ValueError(
            "tta: expected the image as it is, of which the inside is drawn, got other views. Leave it out."
        )
    if isinstance(config.tile.size, int):
        raise ValueError(
            f"tile.size: expected whole images, of which the inside is drawn, got {config.tile.size}. Leave it out."
        )
    path, state = find_checkpoint(config.run, config.checkpoint)
    device = pick_device(config.device)
    model = config.build_model(len(state["class_names"]))
    fill_model(model, state, str(path), config.weights)
    model.to(device)
    folder = Path(config.output) if config.output else run_folder_of(path) / "pyramid"
    thresholds = ScoreThresholds.read(state.get("score_thresholds"), str(path))
    min_scores = thresholds.of(state["class_names"]) if thresholds else None
    panels = []
    for name, batch in _batches(config, model, state["class_names"]):
        panels.append(folder / name)
        panels[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_pyramid(inspect_pyramid(model, batch.to(device), min_scores), batch)).save(panels[-1])
    page = folder / "index.html"
    write_pyramid_page(page, str(path), panels)
    print(f"written: {shown_path(page)}")


def _batches(config: ShowPyramidConfig, model: Detector, class_names: list[str]) -> Iterator[tuple[Path, Batch]]:
    """The name of the picture and the model input of each image."""
    device = pick_device(config.device)
    if config.image:
        yield (
            _names([Path(config.image)])[0],
            build_predictor(config, model, class_names, device).batch_of([config.image]),
        )
        return
    annotations = config.data.read_split(config.split, class_names, config.seed)
    rows = pick_images(annotations, config.count)
    names = _names([annotations.path(row) for row in rows])
    for batch in config.single_images(annotations, rows, model.stride, device):
        yield names[int(batch.indices[0])], batch


def _names(files: Sequence[Path]) -> list[Path]:
    """Distinct names of the pictures, as those of predictions."""
    return [name.with_suffix(".png") for name in drawing_names(files)]
