"""fpn_det from Python: train, evaluate, load, predict.

Settings are given as the words of a command line, `["experiment=r50_fpn", "model.backbone.depth=18"]`, or as the config
object that `composition.compose` makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fpn_det.composition import compose
from fpn_det.config import PRECISIONS, EvalConfig
from fpn_det.errors import translate_system_errors
from fpn_det.evaluation.coco import Evaluation
from fpn_det.evaluation.evaluate import evaluate as evaluate_model
from fpn_det.evaluation.evaluate import write_evaluation
from fpn_det.inference.predictor import ImageInput, Prediction, Predictor
from fpn_det.interop import loading
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.models.weights import refuse_nonfinite_weights
from fpn_det.pretrained import settings_for
from fpn_det.runs import bad_files
from fpn_det.runs.checkpoint import fill_model, find_checkpoint, run_folder_of
from fpn_det.runs.folder import choose_folder
from fpn_det.runs.log import RunLog
from fpn_det.runtime import pick_device, process_group
from fpn_det.training.config import TrainConfig
from fpn_det.training.profile import profiled
from fpn_det.training.trainer import Trainer

__all__ = ["build_model", "evaluate", "load", "predict", "train"]


def train(config: TrainConfig | Sequence[str], overrides: Sequence[str] = ()) -> Path:
    """Train a detector in a run folder of its own, and return that folder.

    Under `torchrun` or a cluster's launcher, every rank calls this.

    Args:
        config: settings.
        overrides: words that the run folder records as its command line.

    Raises:
        ValueError: settings or data cannot be used.
        FloatingPointError: a loss or gradient was not finite; the message says where and names the last checkpoint.
        SystemExit: a signal stopped the run after it was saved; the code is 128 + its number.
    """
    if not isinstance(config, TrainConfig):
        overrides, config = config, compose(config)
    with process_group(config.device, config.trainer.timeout_minutes) as (ranks, device):
        config.set_precision()
        trainer = Trainer(config, ranks, device)
        folder = choose_folder(config.experiment, config.run_dir, config.resume, config.set_aside)
        with folder.locked(), translate_system_errors(folder.resume_advice), RunLog(folder.path, ranks) as log:
            trainer.prepare(folder, log, overrides)
            with profiled(config.profile, log):
                exit_code = trainer.train()
    if exit_code:
        raise SystemExit(exit_code)
    return folder.path


def evaluate(config: EvalConfig) -> Evaluation:
    """Score a checkpoint on a split of its data the COCO way, and write the numbers to `<run>/eval/<checkpoint>`.

    Raises:
        ValueError: there is no such checkpoint, or the data cannot be used.
    """
    path, state = find_checkpoint(config.run, config.checkpoint)
    suffix = "" if config.split == "val" else f"_{config.split}"
    suffix += "" if config.tta == Views() else "_tta"
    suffix += "_proposals" if config.evaluation.target == "proposals" else ""
    folder = run_folder_of(path) / "eval" / f"{path.stem}{suffix}"
    with process_group(config.device, config.timeout_minutes) as (ranks, device):
        config.set_precision()
        if ranks.is_main:
            (folder / bad_files.NAME).unlink(missing_ok=True)  # of an earlier evaluation of this checkpoint
        annotations = config.data.read_split(config.split, state["class_names"], config.seed)
        model = config.build_model(annotations.num_classes)
        weights = fill_model(model, state, str(path), config.weights)
        refuse_nonfinite_weights(model.state_dict(), str(path))
        model.to(device)
        with RunLog(folder, ranks) as log:
            skipped = bad_files.BadFiles(folder, len(annotations), config.data.max_bad_fraction, log.info)
            on_bad_image = skipped if config.data.on_error == "skip" else None
            loader = config.eval_loader(annotations, model.stride, ranks, device, config.split, on_bad_image)
            dtype = PRECISIONS[config.precision]
            evaluation = evaluate_model(model, loader, annotations, config.evaluation, dtype, config.tta)
            step = state["progress"]["step"]
            if ranks.is_main:
                write_evaluation(folder, evaluation, annotations, step, path.name, weights)
            log.evaluation(step, evaluation)
            log.info(f"{weights} weights of {path}, results in {folder}")
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
    source: str | Path, weights: str | Path | None = None, device: str = "auto", tta: Views | None = None
) -> Predictor:
    """A trained detector, ready to predict.

    Args:
        source: a checkpoint, a run folder (its best checkpoint), another project's file of weights, or the name of an
            experiment.
        weights: file of any project whose weights replace those of `source`; required for an experiment.
        device: auto, cpu, cuda, cuda:<number> or mps.
        tta: test-time augmentation, such as `Views(scales=(0.5, 1.0, 2.0), flip=True)`.

    Raises:
        ValueError: there is no such source, or the weights are of another model.
    """
    path = Path(source)
    path = path / "checkpoints" / "best.pt" if path.is_dir() else path
    if path.is_file():
        described = loading.read_as_ours(path)
        config = settings_for(described)
        found = loading.read_as_ours(weights) if weights else described
    elif weights is None:
        compose([f"experiment={source}"])  # refuses an unknown name
        raise ValueError(f"load: expected weights for the experiment {source}, got none. Pass weights=<file>.")
    else:
        config = compose([f"experiment={source}"])
        found = loading.read_as_ours(weights)
    model = config.build_model(found.num_classes)
    loading.load_weights(model, found)
    return config.build_predictor(model, found.names, pick_device(device), tta)


def predict(source: str | Path, images: Sequence[ImageInput], device: str = "auto") -> list[Prediction]:
    """Detect objects in images with the detector of a checkpoint, run folder or file of weights.

    To predict more than once, keep the detector: `load(source).predict(images)`.

    Args:
        source: see `load`.
        images: paths, PIL images, or uint8 RGB arrays [h, w, 3].
        device: see `load`.

    Returns:
        A prediction for each image, in their order.
    """
    return load(source, device=device).predict(images)
