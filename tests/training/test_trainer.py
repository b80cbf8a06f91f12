from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from parts import TinyConfig, TinyData, TinyLoader, TinyTrainer, Watched, differences, make_batch, snapshot
from rich.console import Console

from fpn_det.annotations.findings import Finding
from fpn_det.errors import SystemFault
from fpn_det.runs.folder import choose_folder
from fpn_det.runs.log import RunLog
from fpn_det.runtime import Ranks
from fpn_det.training.config import EarlyStopping, TrainerConfig
from fpn_det.training.optimizers import SGD, AdamW
from fpn_det.training.schedule import Cosine
from fpn_det.training.trainer import Trainer

TRAINER = TrainerConfig(
    max_steps=12, batch_size=4, eval_every="4 steps", save_every="3 steps", log_every="5 steps", clip_norm=1.0, ema=0.9
)
RECIPE = SGD(lr=0.5, base_batch_size=None)


def make_run(
    path: Path,
    resume: str | None = None,
    precision: str = "fp32",
    recipe=RECIPE,
    schedule=Cosine,
    touch=None,
    on_eval_batch=None,
    ranks=Ranks(),  # noqa: B008
    val_batches=([0, 1, 2], [3]),
    findings=None,
    **changes,
) -> Trainer:
    """A run in `path`, ready to train.

    Args:
        touch: see `TinyLoader`.
        on_eval_batch: called before each batch that is evaluated, and after the last.
        changes: settings of the trainer.
    """
    loader = functools.partial(TinyLoader, **({"touch": touch} if touch else {}))
    config = TinyConfig(
        model={},
        data=TinyData(
            loader, Watched([make_batch(rows) for rows in val_batches], on_eval_batch), findings=findings or {}
        ),
        optimizer={},
        schedule={},
        recipe=recipe,
        make_schedule=schedule,
        trainer=dataclasses.replace(TRAINER, **changes),
        precision=precision,
        seed=3,
    )
    folder = choose_folder(None, str(path), resume)
    trainer = TinyTrainer(config, ranks, torch.device("cpu"))
    trainer.prepare(folder, RunLog(folder.path, ranks, screen=Console(quiet=True)))
    return trainer


def result(run: Trainer) -> dict[str, torch.Tensor]:
    """All that training left behind, as tensors."""
    best = run.best
    history = (run.folder.path / "metrics.jsonl").read_bytes()
    return {
        **snapshot(run.optimization),
        "best": torch.tensor([best.value or -1.0, best.step, best.misses]),
        "history": torch.frombuffer(bytearray(history), dtype=torch.uint8),
    }


def stop_before(stop_step: int, number: int):
    """A look at the batches that sends this process a signal when those of `stop_step` are handed out."""

    def touch(step, batch):
        if step == stop_step:
            os.kill(os.getpid(), number)
        return batch

    return touch


def log_of(run: Trainer) -> str:
    return (run.folder.path / "log.txt").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16", "accumulate": 2},
        {"recipe": AdamW(lr=0.01, base_batch_size=None), "clip_norm": None, "ema": None},
        {"precision": "fp16"},
    ],
    ids=["sgd", "bf16-accumulate", "adamw", "fp16"],
)
@pytest.mark.parametrize("stop_step", [0, 6])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, options, stop_step):
    straight = make_run(tmp_path / "straight", **options)
    assert straight.train() == 0
    stopped = make_run(tmp_path / "stopped", touch=stop_before(stop_step, signal.SIGTERM), **options)
    assert stopped.train() == 143
    resumed = make_run(tmp_path / "stopped", resume="auto", **options)
    assert resumed.first_step == stop_step + 1
    assert resumed.train() == 0
    assert differences(result(straight), result(resumed)) == []


def test_interrupt_saves_and_has_its_own_exit_code(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # ignored in the background of a shell
    run = make_run(tmp_path / "run", touch=stop_before(4, signal.SIGINT))
    assert run.train() == 130
    assert run.checkpoints.files()[1].name == "step_00000005.pt"
    assert "Stopped by SIGINT and saved" in log_of(run)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("last_look", [0, 1, 2, 6, 8])
def test_signal_in_an_evaluation_stops_at_once_and_it_is_done_again(tmp_path, last_look):
    """Evaluations are of 3 looks; the second of the last one is the ninth."""

    def look() -> None:
        looks.append(len(looks))
        if len(looks) - 1 == last_look:
            os.kill(os.getpid(), signal.SIGTERM)

    looks: list[int] = []
    straight = make_run(tmp_path / "straight")
    assert straight.train() == 0
    stopped = make_run(tmp_path / "stopped", on_eval_batch=look)
    assert stopped.train() == 143
    assert len(looks) == last_look + 1 and not stopped.checkpoints.is_finished()
    evaluations = (last_look // 3, 4 * (last_look // 3 + 1))
    assert stopped.evaluated == 4 * evaluations[0]
    resumed = make_run(tmp_path / "stopped", resume="auto")
    assert resumed.first_step == evaluations[1]
    assert resumed.train() == 0
    assert resumed.checkpoints.is_finished()
    assert differences(result(straight), result(resumed)) == []


def test_signal_in_the_last_step_leaves_the_evaluation_to_the_next_life(tmp_path):
    run = make_run(tmp_path / "run", touch=stop_before(11, signal.SIGTERM))
    assert run.train() == 143
    again = make_run(tmp_path / "run", resume="auto")
    assert again.first_step == 12 and again.train() == 0
    assert again.evaluated == 12 and again.checkpoints.is_finished()
    assert make_run(tmp_path / "run", resume="auto").train() == 0


def test_signal_while_saving_is_obeyed_after_it(tmp_path):
    run = make_run(tmp_path / "run")
    save = run.checkpoints.save

    def signaled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*arguments)

    run.checkpoints.save = signaled
    assert run.train() == 143
    assert make_run(tmp_path / "run", resume="auto").first_step == 3


def test_run_leaves_what_it_promises(tmp_path):
    run = make_run(tmp_path / "run")
    run.train()
    left = {str(path.relative_to(run.folder.path)) for path in run.folder.path.rglob("*") if path.is_file()}
    assert left >= {
        "log.txt",
        "metrics.json",
        "metrics.jsonl",
        "predictions.json",
        "data_report.json",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
    }
    assert {"checkpoints/step_00000009.pt", "checkpoints/step_00000012.pt"} <= left
    assert "checkpoints/step_00000006.pt" not in left
    metrics = json.loads((run.folder.path / "metrics.json").read_text())
    assert metrics["step"] == 12 and metrics["weights"] == "ema"
    steps = [json.loads(line)["step"] for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12]
    keys = {"format", "model", "ema", "optimizer", "schedule", "scaler", "progress", "best", "rng", "class_names"}
    keys |= {"category_ids", "preprocessing", "config", "versions", "data_digests", "score_thresholds"}
    assert torch.load(run.folder.path / "checkpoints/last.pt", weights_only=True).keys() == keys


def test_no_interval_means_only_at_the_end(tmp_path):
    run = make_run(tmp_path / "run", eval_every=None, save_every=None, log_every=None)
    run.train()
    assert len((run.folder.path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in run.checkpoints.files()] == ["last.pt", "step_00000012.pt", "best.pt"]


def test_length_in_epochs(tmp_path):
    assert make_run(tmp_path / "run", max_steps=None, epochs=2.5).total_steps == 10  # 4 steps per epoch


@pytest.mark.parametrize(
    "eval_every, told", [("4 steps", "every 4 steps"), ("12 steps", "at the end"), (None, "at the end")]
)
def test_introduction_says_when_a_run_of_twelve_steps_is_evaluated(tmp_path, eval_every, told):
    assert f"of 4 steps; evaluated {told}\n" in log_of(make_run(tmp_path / "run", eval_every=eval_every))


def test_finished_run_says_so(tmp_path):
    make_run(tmp_path / "run").train()
    again = make_run(tmp_path / "run", resume="auto")
    before = result(again)
    assert again.train() == 0
    assert "run is complete: 12 of 12 steps are done" in log_of(again)
    assert differences(before, result(again)) == []


def test_longer_run_keeps_its_curve(tmp_path):
    make_run(tmp_path / "run").train()
    longer = make_run(tmp_path / "run", resume="auto", max_steps=15)
    assert longer.train() == 0
    assert longer.optimization.lr == pytest.approx(0.5 * Cosine(steps=12).factor(11))
    assert "keeps its curve over 12 steps" in log_of(longer)
    assert re.search(r"trainer.max_steps +12 +15 +yes", log_of(longer))
    given = make_run(
        tmp_path / "run", resume="auto", max_steps=18, schedule=functools.partial(Cosine, final_factor=0.5)
    )
    assert given.optimization.schedule.steps == 18


def test_truncated_checkpoint_falls_back(tmp_path):
    make_run(tmp_path / "run", touch=stop_before(7, signal.SIGTERM)).train()
    os.truncate(tmp_path / "run" / "checkpoints" / "step_00000008.pt", 1000)
    resumed = make_run(tmp_path / "run", resume="auto")
    assert resumed.first_step == 6
    assert "damaged or foreign file" in log_of(resumed)


def test_early_stop_ends_the_run(tmp_path):
    run = make_run(tmp_path / "run", max_steps=100, early_stop=EarlyStopping(patience=2, min_delta=1.0))
    assert run.train() == 0
    assert run.checkpoints.is_finished()
    assert len((run.folder.path / "metrics.jsonl").read_text().splitlines()) == 3  # the first is progress, two are not
    again = make_run(
        tmp_path / "run", resume="auto", max_steps=100, early_stop=EarlyStopping(patience=2, min_delta=1.0)
    )
    assert again.train() == 0 and "complete" in log_of(again) and "Its early stop is due" in log_of(again)


def test_bad_step_ends_the_run_and_keeps_what_is_good(tmp_path):
    def touch(step, batch):
        if step == 7:
            return dataclasses.replace(batch, pixels=batch.pixels.float() * float("nan"))
        return batch

    run = make_run(tmp_path / "run", touch=touch)
    with pytest.raises(
        FloatingPointError, match=r"^step 8: not finite: pixels of image_12.jpg, .* Last good checkpoint: .*last.pt"
    ):
        run.train()
    assert torch.load(run.folder.path / "checkpoints/last.pt", weights_only=True)["progress"]["step"] == 6
    assert torch.load(run.folder.path / "nan_dump/checkpoint.pt", weights_only=True)["progress"]["step"] == 7


def test_bad_weight_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    with torch.no_grad():
        run.model.head.weight[0, 0] = float("inf")
    with pytest.raises(
        FloatingPointError, match=r"step 1: not finite: weight head.weight, roi_box=inf\. First bad output: head\."
    ):
        run.train()


def test_run_refuses_an_unknown_metric(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.best_metric: expected one of AP, AP50, AP75, APs, .*, got 'mAP'"):
        make_run(tmp_path / "run", best_metric="mAP")


def test_metric_names_are_those_of_an_evaluation(tmp_path):
    run = make_run(tmp_path / "run")
    run.train()
    assert run.evaluation is not None
    assert tuple(run.evaluation.metrics) == run.config.evaluation.metric_names


def test_validation_loss_changes_nothing_but_the_record(tmp_path):
    plain, measured = make_run(tmp_path / "plain"), make_run(tmp_path / "measured", val_loss=True)
    plain.train(), measured.train()
    assert differences(snapshot(plain.optimization), snapshot(measured.optimization)) == []
    records = [json.loads(line) for line in (measured.folder.path / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (plain.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [{**record, "loss": None} for record in records] == [{**record, "loss": None} for record in expected]
    model = measured.optimization.model_to_evaluate.eval()
    with torch.no_grad():  # three images and one
        batches = [measured.val_loader[0], measured.val_loader[1]]
        by_hand = sum(len(batch) * model(batch, 0).total().item() for batch in batches) / 4
    assert records[-1]["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_best_may_be_the_smallest_loss(tmp_path):
    run = make_run(tmp_path / "run", val_loss=True, best_metric="loss")
    run.train()
    losses = {
        record["step"]: record["loss"]
        for record in map(json.loads, (run.folder.path / "metrics.jsonl").read_text().splitlines())
    }
    assert run.best.step == min(losses, key=losses.__getitem__)
    with pytest.raises(
        ValueError, match=r"trainer.best_metric: expected one of AP, .* got 'loss'. Set trainer.val_loss=true."
    ):
        make_run(tmp_path / "other", best_metric="loss")


@pytest.mark.parametrize(
    "options", [{"precision": "fp16", "accumulate": 2}, {"recipe": AdamW(lr=0.01, base_batch_size=None)}], ids=str
)
def test_probe_changes_nothing(tmp_path, options):
    plain, probed = make_run(tmp_path / "plain", **options), make_run(tmp_path / "probed", probe=True, **options)
    plain.train(), probed.train()
    assert differences(result(plain), result(probed)) == []
    assert (
        f"probe: a step with {4 // options.get('accumulate', 1)} images of 8 x 8 px (h x w) with up to 1 objects takes"
        in log_of(probed)
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_too_little_memory_ends_in_one_sentence(tmp_path, error):
    run = make_run(tmp_path / "run")
    run.model.forward = lambda batch, step: (_ for _ in ()).throw(error)
    with pytest.raises(SystemFault) as fault:
        run.train()
    assert str(fault.value).startswith(
        "memory: expected room for 4 images of 8 x 8 px (h x w) with up to 1 objects, got: "
    )
    assert "trainer.accumulate" in str(fault.value) and "\n" not in str(fault.value)


def test_resume_refuses_other_classes(tmp_path):
    make_run(tmp_path / "run").train()
    run = make_run(tmp_path / "other")
    run.metadata["class_names"][:] = ["other"]
    with pytest.raises(ValueError, match="resume: expected the classes of the checkpoint, thing, got other"):
        run._restore(torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True))


def test_findings_are_on_the_log_and_in_the_run_folder(tmp_path):
    findings = {"train": [Finding("box_outside", "expected a box that touches the image", image_id=3)] * 7, "val": []}
    run = make_run(tmp_path / "run", findings=findings)
    assert "box_outside (7)" in log_of(run) and "... and 2 more" in log_of(run)
    report = json.loads((run.folder.path / "data_report.json").read_text())
    assert report["counts"] == {"box_outside": 7} and len(report["splits"]["train"]["box_outside"]["first"]) == 5


def test_resumed_run_tells_that_its_data_changed(tmp_path):
    make_run(tmp_path / "run").train()
    path = tmp_path / "run/checkpoints/last.pt"
    state = torch.load(path, weights_only=True)
    state["data_digests"]["train"] = "of other boxes"
    path.unlink()  # it is a link to the checkpoint of the step
    torch.save(state, path)
    resumed = make_run(tmp_path / "run", resume="auto")
    assert "data.train: images or annotations have changed since the checkpoint" in log_of(resumed)
    assert "data.val: images" not in log_of(resumed)


@pytest.mark.parametrize("what", ["figures", "memory"])
def test_a_checkpoint_that_is_due_survives_its_evaluation(tmp_path, what):
    """Step 12 is due for both."""
    run = make_run(tmp_path / "run", eval_every="12 steps", save_every="12 steps")

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.") if what == "memory" else IndexError("a picture")

    if what == "memory":
        run.optimization.model_to_evaluate.detect = fail
        with pytest.raises(SystemFault, match=r"^memory: expected room to evaluate 1 image\(s\) at a time, got: CUDA"):
            run.train()
    else:
        run.log_figures = fail
        assert run.train() == 0 and "figures of step 12 could not be drawn: IndexError: a picture" in log_of(run)
    assert make_run(tmp_path / "run", resume="auto").first_step == 12
