"""Write a report of a trained detector: what it reaches, where it fails, which annotations look wrong.

Evaluates the best checkpoint of a run, as `fpn-det eval` does, and writes index.html, per_class.csv, errors.csv,
levels.csv, suspects.csv and suspects.json (COCO) to <run>/report, or to <run>/report_<split> for another split than
val.

Examples:
  fpn-det report run=runs/demo
  fpn-det report run=runs/demo against=runs/other
  fpn-det report run=runs/demo split=train
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fpn_det import api
from fpn_det.cli.eval import saved_settings
from fpn_det.cli.launch import launch
from fpn_det.composition import compose_as, literal, read_saved
from fpn_det.config import EvalConfig
from fpn_det.report.analysis import Analysis, analyze, compare
from fpn_det.run_report import name_of, write_run_report
from fpn_det.runs.checkpoint import find_checkpoint, run_folder_of
from fpn_det.runs.settings_diff import affects_results, differing, read_settings, setting_of
from fpn_det.terminal import shown_path

# Words that hold for both detectors of a comparison. The metrics are those of the first one.
SHARED = ("split", "data", "device", "precision", "weights", "tta", "tile", "allow_targets")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(EvalConfig):
    """Settings of the run or checkpoint, and the run to compare it with."""

    # run folder, whose best checkpoint is evaluated in the same way, with its own model and preprocessing
    against: str | None = None


def main() -> None:
    """Report on the detector that the command line names."""
    launch(report, ReportConfig, "report", saved_settings)


def report(config: ReportConfig, words: Sequence[str]) -> None:
    """Evaluate and write the report.

    Raises:
        ValueError: proposals are to be evaluated, or the other run has other images.
    """
    if config.evaluation.target == "proposals":
        raise ValueError("evaluation: expected detections, of which a report is made, got proposals. Use fpn-det eval.")
    path, state = find_checkpoint(config.run, config.checkpoint)
    run = run_folder_of(path)
    against = None
    # before the first evaluation, which may take long
    other_config = None if config.against is None else _config_of_other(config, config.against, words)
    analysis = _analyze(config)
    if config.against is not None and other_config is not None:
        other = _analyze(other_config)
        title, name = name_of(run), name_of(Path(config.against))
        if name == title:
            name = str(shown_path(Path(config.against)))
        _, other_state = find_checkpoint(config.against, None)
        changed = differing([read_settings(one["config"]) for one in (state, other_state)])
        same_settings = config.model == other_config.model and all(
            setting.split(".")[-1] == "seed" for setting in changed if affects_results(setting)
        )
        against = name, other, compare(analysis, other, same_settings)
        print(against[2].verdict(title, name))
    suffix = "" if config.split == "val" else f"_{config.split}"
    checkpoint = {"checkpoint": path.name, "step": str(state["progress"]["step"])}
    typed = [word for word in words if setting_of(word) not in ("run", "checkpoint", "against")]
    if typed:  # the folder is the same, whatever they are
        checkpoint["words of the command"] = " ".join(typed)
    splits = {str(config.split): analysis.annotations}
    page = write_run_report(run, run / f"report{suffix}", analysis, splits, state["config"], checkpoint, against)
    print(f"written: {shown_path(page)}")


def _config_of_other(config: ReportConfig, run: str, words: Sequence[str]) -> EvalConfig:
    """The settings of the evaluation of the other run, on the same images and with the same metrics."""
    _, state = find_checkpoint(run, None)
    shared = [word for word in words if setting_of(word).split(".")[0] in SHARED]
    own = compose_as(EvalConfig, "eval", [literal("run", run), *shared], read_saved(state["config"]))
    return replace(own, evaluation=config.evaluation)


def _analyze(config: EvalConfig) -> Analysis:
    evaluation = api.evaluate(config)
    _, state = find_checkpoint(config.run, config.checkpoint)
    annotations = config.data.read_split(config.split, state["class_names"], config.seed)
    model = config.build_model(annotations.num_classes)
    transform, limit = config.data.transforms(train=False), config.data.max_image_pixels
    return analyze(annotations, evaluation, config.evaluation, model, transform, limit)
