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
from dataclasses import dataclass
from pathlib import Path

from fpn_det import api
from fpn_det.cli.eval import saved_settings
from fpn_det.cli.launch import launch
from fpn_det.composition import compose_as, literal, read_saved
from fpn_det.config import EvalConfig
from fpn_det.report.analysis import Analysis, analyze, compare
from fpn_det.run_report import write_run_report
from fpn_det.runs.checkpoint import find_checkpoint, run_folder_of
from fpn_det.runs.settings_diff import affects_results, differing, read_settings
from fpn_det.terminal import shown_path


@dataclass(frozen=True, kw_only=True)
class ReportConfig(EvalConfig):
    """Settings of the run or checkpoint, and the run to compare it with."""

    against: str | None = None  # run folder; its best checkpoint is evaluated on its own settings


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
    analysis = _analyze(config)
    if config.against is not None:
        _, other_state = find_checkpoint(config.against, None)
        shared = [word for word in words if word.startswith(("split=", "data.", "device=", "allow_targets="))]
        other_words = [literal("run", config.against), *shared]
        other = _analyze(compose_as(EvalConfig, "eval", other_words, read_saved(other_state["config"])))
        name = Path(config.against).name
        changed = differing([read_settings(one["config"]) for one in (state, other_state)])
        same_settings = all(setting.split(".")[-1] == "seed" for setting in changed if affects_results(setting))
        against = name, other, compare(analysis, other, same_settings)
        print(against[2].verdict(run.name, name))
    suffix = "" if config.split == "val" else f"_{config.split}"
    checkpoint = {"checkpoint": path.name, "step": str(state["progress"]["step"])}
    splits = {str(config.split): analysis.annotations}
    page = write_run_report(run, run / f"report{suffix}", analysis, splits, state["config"], checkpoint, against)
    print(f"written: {shown_path(page)}")


def _analyze(config: EvalConfig) -> Analysis:
    evaluation = api.evaluate(config)
    _, state = find_checkpoint(config.run, config.checkpoint)
    annotations = config.data.read_split(config.split, state["class_names"], config.seed)
    model = config.build_model(annotations.num_classes)
    return analyze(annotations, evaluation, config.evaluation, model, config.data.transforms(train=False))
