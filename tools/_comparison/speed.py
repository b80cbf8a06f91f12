"""Cost of each row: parameters, seconds per image and per training step, on one core, in alternation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

from _comparison.rows import Row
from fpn_det.composition import compose
from fpn_det.runs.checkpoint import fill_model, load_checkpoint
from fpn_det.runtime import Ranks

CPU = torch.device("cpu")
NUM_IMAGES = 16  # that are detected on, one by one
ROUNDS = 3

Work = dict[str, Callable[[int], None]]  # by what is measured; its argument is the number of the round


def measure(rows: Mapping[str, Row], folder: Path, overrides: Sequence[str]) -> dict[str, dict[str, float]]:
    """`parameters`, `inference_s` of an image and `step_s` of a training step, by the names of rows; of their first seeds.

    The clock is that of the process: it stands still while other programs have the core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    contestants = {name: _contestant(row, rows, folder, overrides) for name, row in rows.items()}
    costs = {name: {"parameters": parameters} for name, (parameters, _) in contestants.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(ROUNDS + 1):
        for name, (_, work) in contestants.items():
            for what, run in work.items():
                start = time.process_time()
                run(number)
                if number:  # the first round allocates
                    seconds.setdefault((name, what), []).append(time.process_time() - start)
    for (name, what), spent in seconds.items():
        costs[name][what] = statistics.median(spent) / (NUM_IMAGES if what == "inference_s" else 1)
    torch.set_num_threads(threads)
    return costs


def _contestant(row: Row, rows: Mapping[str, Row], folder: Path, overrides: Sequence[str]) -> tuple[float, Work]:
    """Number of parameters, and what is to be timed."""
    trained = rows[row.weights_of] if row.weights_of else row
    words = [
        *trained.settings,
        *(row.settings if row.weights_of else ()),
        "data.num_workers=0",
        *overrides,
    ]
    settings = compose([*words, "data.eval_batch_size=1", "device=cpu"])
    annotations = settings.data.read_train_and_val(0).val
    model = settings.build_model(annotations.num_classes)
    file = folder / trained.name / "seed0" / "checkpoints" / "last.pt"
    fill_model(model, load_checkpoint(file), str(file))
    images = list(islice(settings.eval_loader(annotations, model.stride, Ranks(), CPU), NUM_IMAGES))
    loader = settings.train_loader(annotations, model.stride, Ranks(), CPU)
    batches = [loader.rebuild(number)[0] for number in range(ROUNDS + 1)]  # several, because scales are drawn

    def detect(number: int) -> None:
        model.eval()
        for image in images:
            model.detect(image)

    def step(number: int) -> None:
        model.train()
        model(batches[number], number).total().backward()

    parameters = float(sum(weight.numel() for weight in model.parameters()))
    return parameters, {"inference_s": detect} if row.weights_of else {"inference_s": detect, "step_s": step}
