"""The report of a run: what its folder knows, beside the analysis of an evaluation."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpn_det.annotations.findings import WITHOUT_OBJECTS
from fpn_det.composition import compose
from fpn_det.report.analysis import Analysis, Comparison, analyze
from fpn_det.report.page import RunFacts, write_report
from fpn_det.runs.folder import versions
from fpn_det.runs.log import event_folder
from fpn_det.runs.scalars import read_scalars
from fpn_det.runs.settings_diff import ABSENT, affects_results, differing, read_settings
from fpn_det.structures import Annotations
from fpn_det.terminal import shown_path
from fpn_det.training.trainer import Trainer


def write_run_report(
    run: Path,
    folder: Path,
    analysis: Analysis,
    splits: Mapping[str, Annotations],
    config: str,
    checkpoint: Mapping[str, str],
    against: tuple[str, Analysis, Comparison] | None = None,
) -> Path:
    """Write the report of a run. Returns the page.

    Args:
        run: folder of the run, with its curves, versions and findings.
        folder: of the report; created if it does not exist.
        analysis: of its detections.
        splits: annotations by name, which are summarized.
        config: saved settings of the run, YAML.
        checkpoint: file and step of the weights, by name.
        against: name, analysis and comparison of another run.
    """
    scalars = read_scalars(event_folder(run))
    then, now = _read_json(run / "versions.json"), versions()
    counts = _read_json(run / "data_report.json").get("counts", {})
    evaluation = analysis.evaluation
    speed = {"evaluation, images per second": f"{evaluation.num_images / max(evaluation.seconds, 1e-9):.1f}"}
    if points := scalars.get("machine/images_per_s"):
        speed["training, images per second (median)"] = f"{statistics.median(value for _, value in points):.1f}"
    if points := scalars.get("machine/memory_mib"):
        speed["training, peak of memory"] = f"{max(value for _, value in points):.0f} MiB"
    facts = RunFacts(
        scalars,
        {split: _summary(annotations, analysis) for split, annotations in splits.items()},
        {str(name): int(count) for name, count in counts.items() if name != WITHOUT_OBJECTS},
        changed_settings(config),
        [[name, str(then.get(name, ABSENT)), str(version)] for name, version in now.items()],
        {**checkpoint, **speed},
    )
    return write_report(folder, name_of(run), analysis, facts, against)


def name_of(run: Path) -> str:
    """Return the name of the folder of a run, also of `.`."""
    return os.path.basename(os.path.abspath(run))


def report_after_training(trainer: Trainer) -> None:
    """Write the report of the last evaluation of a run. A failure is logged and ends nothing. Rank 0 only."""
    config, run, evaluation = trainer.config, trainer.folder.path, trainer.evaluation
    if not config.trainer.report or evaluation is None or config.evaluation.target == "proposals":
        return
    try:
        transform = config.data.transforms(train=False)
        page = write_run_report(
            run,
            run / "report",
            analyze(
                trainer.val_annotations,
                evaluation,
                config.evaluation,
                trainer.model,
                transform,
                config.data.max_image_pixels,
            ),
            {"train": trainer.train_annotations, "val": trainer.val_annotations},
            trainer.metadata["config"],
            {"checkpoint": "last.pt", "step": str(trainer.evaluated)},
        )
    except Exception as error:  # a report is not worth a run
        trainer.log.info(f"The report could not be written: {type(error).__name__}: {error}")
    else:
        trainer.log.info(f"Report: {shown_path(page)}")


def changed_settings(text: str) -> list[list[str]]:
    """Return name, value of the experiment's file and value of the run, for the settings in which they differ."""
    run = read_settings(text)
    try:
        experiment = read_settings(compose([f"experiment={run['experiment']}"]).to_yaml())
    except (KeyError, ValueError):  # the experiment has no file here
        return []
    names = [name for name in differing([experiment, run]) if affects_results(name)]
    return [[name, *(str(one.get(name, ABSENT)) for one in (experiment, run))] for name in names]


def _summary(annotations: Annotations, analysis: Analysis) -> dict[str, str]:
    objects = ~annotations.iscrowd
    area, sizes = annotations.area[objects], annotations.sizes.float()
    counts = {
        "images": len(annotations),
        "without objects": int((annotations.boxes_per_image == 0).sum()),
        "objects": int(objects.sum()),
        "crowd regions": int(annotations.iscrowd.sum()),
    }
    for name, (low, high) in analysis.config.area_ranges.items():
        counts[f"objects, {name}"] = int(((area >= low) & (area < high)).sum())
    height, width = sizes.median(dim=0).values.tolist() if len(sizes) else (0, 0)
    return {name: str(count) for name, count in counts.items()} | {"median size": f"{width:.0f} x {height:.0f} px"}


def _read_json(file: Path) -> dict[str, Any]:
    """Read an object; an absent or damaged file is an empty one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
