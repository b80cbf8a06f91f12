"""Score a detector the COCO way: python tools/eval.py run=<folder>, or checkpoint=<file> [split=test|train] [setting=value ...].

Settings, classes and preprocessing are those that the checkpoint was trained with; data paths, device and the like may be
given anew. `evaluation=proposals` measures the RPN's boxes, also those of a whole detector. Results go to
<run>/eval/<checkpoint>/, never over the run's own files.
"""

from __future__ import annotations

from fpn_det import api
from fpn_det.config import EvalSettings, argument, launch
from fpn_det.evaluation.evaluate import evaluate, write_evaluation
from fpn_det.models.views import Views
from fpn_det.runs.checkpoint import folder_of_run, named_checkpoint
from fpn_det.runs.log import RunLog
from fpn_det.runtime import process_group
from fpn_det.training.optimization import PRECISIONS


def score(settings: EvalSettings) -> None:
    """Detect on all images of a split, score, and leave the numbers in a folder."""
    path, state = named_checkpoint(settings.run, settings.checkpoint)
    kind = ("" if settings.split == "val" else f"_{settings.split}") + ("" if settings.tta == Views() else "_tta")
    kind += "_proposals" if settings.evaluation.target == "proposals" else ""
    folder = folder_of_run(path) / "eval" / f"{path.stem}{kind}"
    with process_group(settings.device, settings.trainer.timeout_minutes) as (ranks, device):
        annotations = api.read_evaluation_data(settings.data, settings.split, state["class_names"], settings.seed)
        model = api.build_model(settings, annotations.num_classes)
        weights = api.load_weights(model, state, str(path), settings.weights)
        model.to(device)
        loader = api.build_eval_loader(settings, annotations, model.stride, ranks, device, split=settings.split)
        with RunLog(folder, ranks) as log:
            dtype = PRECISIONS[settings.precision]
            evaluation = evaluate(model, loader, annotations, settings.evaluation, dtype, settings.tta)
            step = state["progress"]["step"]
            if ranks.is_main:
                write_evaluation(folder, evaluation, annotations, step, path.name, weights)
            log.evaluation(step, evaluation)
            log.info(f"{weights} weights of {path}, results in {folder}")


if __name__ == "__main__":
    launch(score, EvalSettings, "eval", lambda: named_checkpoint(argument("run"), argument("checkpoint"))[1]["config"])
