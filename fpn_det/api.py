"""fpn_det from Python: train, evaluate, load, predict.

Settings are the words of a command line, `["experiment=r50_fpn", "model.backbone.depth=18"]`, or the config object that
`composition.compose` makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fpn_det.composition import compose, compose_as, from_saved, literal, read_saved
from fpn_det.config import PRECISIONS, DetectorConfig, EvalConfig, is_exported
from fpn_det.errors import translate_system_errors
from fpn_det.evaluation.coco import Evaluation
from fpn_det.evaluation.evaluate import WeightsKind, write_evaluation
from fpn_det.evaluation.evaluate import evaluate as evaluate_model
from fpn_det.export.export import open_exported, saved_settings
from fpn_det.export.exported import ExportedDetector
from fpn_det.inference.images import ImageInput
from fpn_det.inference.prediction import Prediction
from fpn_det.inference.predictor import Predictor, build_predictor
from fpn_det.interop import loading
from fpn_det.interop.catalog import PUBLISHED, check_detector
from fpn_det.interop.naming import PROJECTS
from fpn_det.locations import CONFIGS
from fpn_det.models.detector import Detector
from fpn_det.models.tiles import check_tiles
from fpn_det.models.views import Views
from fpn_det.models.weights import refuse_nonfinite_weights
from fpn_det.pretrained import settings_for
from fpn_det.run_report import report_after_training
from fpn_det.runs import bad_files
from fpn_det.runs.checkpoint import checkpoint_of, fill_model, find_checkpoint, remark_on, run_folder_of
from fpn_det.runs.folder import choose_folder
from fpn_det.runs.log import RunLog
from fpn_det.runs.settings_diff import Flat, affects_results, differing, read_settings
from fpn_det.runtime import pick_device, process_group
from fpn_det.schema import did_you_mean
from fpn_det.structures import ScoreThresholds
from fpn_det.terminal import shown_path
from fpn_det.training.config import TrainConfig
from fpn_det.training.profile import profiled
from fpn_det.training.trainer import Trainer

__all__ = [
    "Detector",
    "Evaluation",
    "Prediction",
    "Predictor",
    "Views",
    "build_model",
    "evaluate",
    "load",
    "predict",
    "train",
]


def __dir__() -> list[str]:
    return __all__


def train(config: TrainConfig | str | Sequence[str], overrides: Sequence[str] = ()) -> Path:
    """Train a detector in a run folder of its own, and return that folder.

    Under `torchrun` or a cluster's launcher, every rank calls this.

    Args:
        config: settings: `["experiment=small", "data=yolo", "data.root=datasets/my_data"]`.
        overrides: words that the run folder records as its command line.

    Raises:
        ValueError: settings or data cannot be used.
        FloatingPointError: a loss or gradient was not finite; the message says where and names the last checkpoint.
        SystemExit: a signal stopped the run after it was saved; the code is 128 + its number.
    """
    if not isinstance(config, TrainConfig):
        overrides = [config] if isinstance(config, str) else config
        config = compose(overrides)
    with process_group(config.device, config.trainer.timeout_minutes) as (ranks, device):
        config.set_precision()
        trainer = Trainer(config, ranks, device)
        folder = choose_folder(config.experiment, config.run_dir, config.resume, config.set_aside)
        with folder.locked(), translate_system_errors(folder.resume_advice), RunLog(folder.path, ranks) as log:
            with folder.discarded_on_failure(lambda: trainer.has_trained):
                trainer.prepare(folder, log, overrides)
                with profiled(config.profile, log):
                    exit_code = trainer.train()
            if ranks.is_main and not exit_code:
                report_after_training(trainer)
    if exit_code:
        raise SystemExit(exit_code)
    return folder.path


def evaluate(config: EvalConfig | str | Path, overrides: str | Sequence[str] = ()) -> Evaluation:
    """Score a checkpoint on a split of its data the COCO way, and write the numbers to `<run>/eval/<checkpoint>`.

    Args:
        config: a run folder, a checkpoint, or the settings of an evaluation.
        overrides: settings that differ from those of the run: `["split=test", "tta.flip=true"]`.

    Raises:
        ValueError: there is no such checkpoint, or the data cannot be used.
    """
    if not isinstance(config, EvalConfig):
        config = _eval_config(Path(config), [overrides] if isinstance(overrides, str) else overrides)
    exported: ExportedDetector | None = None
    trained: DetectorConfig
    if is_exported(config.checkpoint):
        exported, trained = open_exported(config.checkpoint, config.allow_targets)
        if config.tiling is not None:
            check_tiles(exported)
        path = exported.file.path
        about = exported.file.metadata
        state = asdict(about) | {"progress": {"step": about.step}}
    else:
        path, state = find_checkpoint(config.run, config.checkpoint)
        trained = from_saved(state["config"], str(path), config.allow_targets)
    suffix = "" if config.split == "val" else f"_{config.split}"
    suffix += "" if config.tta == Views() else "_tta"
    if config.tiling != trained.tiling:
        suffix += f"_tile{config.tiling.size}" if config.tiling else "_whole"
    suffix += "_proposals" if config.evaluation.target == "proposals" else ""
    folder = run_folder_of(path) / "eval" / f"{path.name if exported else path.stem}{suffix}"
    with process_group(config.device, config.timeout_minutes) as (ranks, device):
        config.set_precision()
        if ranks.is_main:
            (folder / bad_files.NAME).unlink(missing_ok=True)  # of an earlier evaluation of this checkpoint
        annotations = config.data.read_split(config.split, state["class_names"], config.seed)
        model: Detector | ExportedDetector
        weights: WeightsKind
        if exported:
            model, weights = exported, "exported"
        else:
            model = config.build_model(annotations.num_classes)
            weights = fill_model(model, state, str(path), config.weights)
            refuse_nonfinite_weights(model.state_dict(), str(path))
            model.to(device)
        with RunLog(folder, ranks) as log:
            if remark := remark_on(path):
                log.info(remark)
            skipped = bad_files.BadFiles(folder, len(annotations), config.data.max_bad_fraction, log.info)
            on_bad_image = skipped if config.data.on_error == "skip" else None
            place = annotations, model.stride, ranks, device, config.split
            loader = config.eval_loader(*place, on_bad_image, config.tiling)
            batches, dtype = log.track(loader, "evaluating"), PRECISIONS[config.precision]
            evaluation = evaluate_model(model, batches, annotations, config.evaluation, dtype, config.tta)  # type: ignore[arg-type]
            step = state["progress"]["step"]
            if ranks.is_main:
                changed = _changed_settings(trained, config)
                write_evaluation(folder, evaluation, annotations, step, path.name, weights, changed)
            log.evaluation(step, evaluation)
            log.info(f"{weights} weights of {shown_path(path)}\nresults in {shown_path(folder)}")
    return evaluation


def build_model(config: TrainConfig | Sequence[str], num_classes: int) -> Detector:
    """A detector with random weights. No file is read.

    Args:
        config: settings.
        num_classes: foreground classes.

    Raises:
        ValueError: the settings describe no detector.
    """
    config = config if isinstance(config, TrainConfig) else compose(config)
    return config.build_model(num_classes)


def load(
    source: str | Path,
    weights: str | Path | None = None,
    device: str = "auto",
    tta: Views | None = None,
    allow_targets: Sequence[str] = (),
) -> Predictor:
    """A trained detector, ready to predict.

    Args:
        source: a checkpoint, a run folder (its best checkpoint), an exported file (which runs on the CPU), another
            project's file of weights, the name of a published detector (`fpn-det weights` lists them; it is fetched
            once), or the name of an experiment.
        weights: file of any project whose weights replace those of `source`; required for an experiment.
        device: auto, cpu, cuda, cuda:<number> or mps.
        tta: test-time augmentation, such as `Views(scales=(0.5, 1.0, 2.0), flip=True)`.
        allow_targets: packages of your own whose classes the settings of `source` may name.

    Raises:
        ValueError: there is no such source, or the weights are of another model.
    """
    path = Path(source)
    if path.is_dir():
        path = checkpoint_of(path)
        if remark := remark_on(path):
            print(remark, file=sys.stderr)
    if is_exported(path):
        exported, settings = open_exported(path, allow_targets)
        about = exported.file.metadata
        return build_predictor(
            settings,
            exported,
            about.class_names,
            pick_device("cpu"),
            tta,
            about.category_ids,
            ScoreThresholds.read(about.score_thresholds, str(path)),
        )
    if path.is_file() or str(source) in PUBLISHED:
        described = loading.read_as_ours(path)
        config = settings_for(described, allow_targets)
        found = loading.read_as_ours(weights) if weights else described
    else:
        if str(source).split("/")[0] in PROJECTS:
            check_detector(source, "load")
        config = _experiment(source)
        if weights is None:
            raise ValueError(f"load: expected weights for the experiment {source}, got none. Pass weights=<file>.")
        found = loading.read_as_ours(weights)
    model = config.build_model(found.num_classes)
    loading.load_weights(model, found)
    where = pick_device(device)
    thresholds = ScoreThresholds.read(found.score_thresholds, found.source)
    return build_predictor(config, model, found.names, where, tta, found.category_ids, thresholds)


def predict(
    source: str | Path, images: ImageInput | Sequence[ImageInput], device: str = "auto", **options: Any
) -> list[Prediction]:
    """Detect objects in images with the detector of a checkpoint, run folder or file of weights.

    To predict more than once, keep the detector: `load(source).predict(images)`.

    Args:
        source: see `load`.
        images: a path, folder, pattern, list of paths, URL, PIL image or array, or a list of these. For a video, use
            `load(source).predict_video(file)`.
        device: see `load`.
        options: of `Predictor.predict`: score, classes, max_detections, size, tile, overlap, download.

    Returns:
        A prediction for each image, in their order.
    """
    return load(source, device=device).predict(images, **options)


def _experiment(name: str | Path) -> TrainConfig:
    """The settings of an experiment.

    Raises:
        ValueError: there is none of that name.
    """
    folder = CONFIGS / "experiment"
    known = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]
    if str(name) not in known:
        raise ValueError(
            f"load: expected a run folder, a file of weights or an experiment, got {name}, which is none of them."
            f"{did_you_mean(str(name), known)} fpn-det runs lists the runs, fpn-det experiments the experiments."
        )
    return compose([f"experiment={name}"])


def _changed_settings(trained: DetectorConfig, config: DetectorConfig) -> Flat:
    """The settings of detector, data and evaluation that are others than in the training, with their values."""
    before, now = (read_settings(one.to_yaml()) for one in (trained, config))
    parts = {item.name for item in fields(DetectorConfig)} - {"device"}
    names = [name for name in differing([before, now]) if name.split(".")[0] in parts and affects_results(name)]
    return {name: now.get(name) for name in names}


def _eval_config(source: Path, overrides: Sequence[str]) -> EvalConfig:
    """The settings of the evaluation of a run folder or checkpoint."""
    name = "checkpoint" if source.is_file() else "run"
    place = {name: str(source)}
    saved = read_saved(saved_settings(place.get("run"), place.get("checkpoint")))
    return compose_as(EvalConfig, "eval", [literal(name, str(source)), *overrides], saved)
