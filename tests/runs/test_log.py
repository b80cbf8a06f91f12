from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpn_det.evaluation.coco import Evaluation
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.runs.log import RunLog
from fpn_det.runs.meters import Pace
from fpn_det.runtime import Ranks


def evaluation_of(ap: float | None, num_classes: int = 2) -> Evaluation:
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    row = {"AP": ap, "AP50": 0.875, "AR": None, "F1": 0.5, "score": 0.25, "objects": 3, "detections": 0}
    per_class = {f"[class] {k}": dict(row) for k in range(num_classes)}
    return Evaluation(
        dict.fromkeys(names, ap), per_class, 40, 100, 7, DetectionTable.join([]), {"detections/P2": 4.5}, 12.0
    )


def points(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_log_writes_plain_lines_to_a_pipe(tmp_path, capsys):
    with RunLog(tmp_path, Ranks()) as log:
        pace = Pace(0, 20, 2, 0)
        log.begin(pace)
        log.advance(10, pace)
        assert list(log.track([1, 2], "evaluating")) == [1, 2]
        log.train(
            10, {"loss": 0.5, "rpn_box": 0.25, "lr": 0.0025, "memory_mib": 12345.6, "rois/P2": 17.0}, ["rpn_box"], pace
        )
        log.info("images [12, 99]")
    screen, file = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    assert "\r" not in screen + file and "\x1b" not in screen + file
    header, line, text = screen.splitlines()
    assert header.split() == ["step", "loss", "rpn_box", "lr", "img/s", "left"]
    assert line.split()[:4] == ["10/20", "0.5000", "0.2500", "0.0025"] and line.endswith("0:00:00")
    assert len(header) == len(line) and text == "images [12, 99]"
    assert [entry[21:] for entry in file.splitlines()] == screen.splitlines()


def test_log_shows_a_bar_on_a_terminal(tmp_path):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with RunLog(tmp_path, Ranks(), screen) as log:
        pace = Pace(0, 20, 2, 0)
        log.begin(pace)
        log.advance(10, pace)
        assert list(log.track([1, 2], "evaluating")) == [1, 2]
        log.train(10, {"loss": 0.5}, [], pace)
    shown = screen.file.getvalue()
    assert "10/20" in shown and "loss 0.5000" in shown and "0:00:00 left" in shown
    assert "\r" not in (tmp_path / "log.txt").read_text()


def test_log_shows_no_bar_of_training_where_nothing_is_trained(tmp_path):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    (tmp_path / "training.jsonl").write_text('{"step": 7}\n')
    with RunLog(tmp_path, Ranks(), screen) as log:
        log.begin(Pace(0, 2, 2, 0), trains=False)
        assert list(log.track([1, 2], "drawing")) == [1, 2]
    shown = screen.file.getvalue()
    assert "drawing" in shown and "training" not in shown
    assert (tmp_path / "training.jsonl").read_text() == '{"step": 7}\n'  # of a run in this folder


def test_log_keeps_the_values_of_steps_in_lines_of_json_that_a_resumed_run_continues(tmp_path):
    def write(first: int, last: int, loss: float) -> None:
        with RunLog(tmp_path, Ranks(), Console(file=io.StringIO())) as log:
            pace = Pace(first, 10, 2, 0)
            log.begin(pace, loggers=())
            for step in range(first + 2, last + 1, 2):
                log.train(step, {"loss": loss, "lr": 0.5, "rois/P2": float("nan")}, [], pace)

    write(0, 6, loss=1.0)
    file = tmp_path / "training.jsonl"
    file.write_text(file.read_text() + '{"step": 8, "lo')  # of a killed run
    write(4, 8, loss=0.25)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(record["step"], record["loss/loss"]) for record in records] == [(2, 1.0), (4, 1.0), (6, 0.25), (8, 0.25)]
    assert all(record["pyramid/rois/P2"] is None and record["lr"] == 0.5 for record in records)
    assert "machine/images_per_s" in records[0]


def test_log_of_another_rank_goes_to_its_own_file(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, Ranks(rank=3, world_size=4)) as log:
        pace = Pace(0, 20, 2, 0)
        log.begin(pace)
        log.train(10, {"loss": 0.5}, [], pace)
        log.evaluation(10, evaluation_of(0.5))
        log.image(10, "batch", np.zeros((4, 4, 3), np.uint8))
        raise ZeroDivisionError("of this rank")
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["rank3.log"]
    text = (tmp_path / "rank3.log").read_text()
    assert " 0.5000 " in text and "ZeroDivisionError: of this rank" in text


def test_log_shows_undefined_as_na_and_keeps_it_out_of_the_curves(tmp_path, capsys):
    with RunLog(tmp_path, Ranks()) as log:
        log.begin(Pace(0, 20, 2, 0))
        log.evaluation(10, evaluation_of(None))
        log.evaluation(20, evaluation_of(0.25))
    shown = capsys.readouterr().out
    assert "n/a" in shown and "0.250" in shown and "[class] 1" in shown and "-1" not in shown
    assert "evaluation at step 20: 40 images in 12.0 s" in shown
    assert "7 of 40 images reached the limit of 100 detections." in shown
    assert points(tmp_path)["AP/AP"] == [(20, 0.25)]
    assert points(tmp_path)["pyramid/detections/P2"] == [(10, 4.5), (20, 4.5)]
    assert points(tmp_path)["per_class_AP/[class] 0"] == [(20, 0.25)]


def test_log_table_holds_all_classes(tmp_path):
    with RunLog(tmp_path, Ranks(), Console(file=io.StringIO(), width=80)) as log:
        log.evaluation(10, evaluation_of(0.5, num_classes=80))
    text = (tmp_path / "log.txt").read_text()
    assert all(f"[class] {k} " in text for k in range(80))


def test_log_table_of_proposals_is_whole_on_80_columns(tmp_path):
    names = EvaluationConfig((100, 300, 1000), target="proposals").metric_names
    evaluation = replace(evaluation_of(0.5), metrics=dict.fromkeys(names, 0.125), per_class={})
    with RunLog(tmp_path, Ranks(), Console(file=io.StringIO(), width=80)) as log:
        log.evaluation(10, evaluation)
    words = (tmp_path / "log.txt").read_text().split()
    assert len(names) == 12 == words.count("0.125") and set(names) <= set(words)


def test_log_curves_are_monotonic_after_a_resume(tmp_path):
    with RunLog(tmp_path, Ranks()) as log:
        log.begin(Pace(0, 10, 1, 0))
        for step in range(1, 7):
            log.scalars(step, {"loss/loss": 1.0})
    (file,) = tmp_path.glob("events.*")
    file.rename(tmp_path / "events.out.tfevents.0")  # precedes the next also if both were made in one second
    with RunLog(tmp_path, Ranks()) as log:
        log.begin(Pace(3, 10, 1, 0))
        for step in range(4, 7):
            log.scalars(step, {"loss/loss": 2.0})
    assert points(tmp_path)["loss/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_log_continues_the_curves_of_an_earlier_version_where_they_are(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    with RunLog(tmp_path, Ranks()) as log:
        log.begin(Pace(3, 10, 1, 0))
        log.scalars(4, {"lr": 1.0})
    assert points(tmp_path / "tensorboard")["lr"] == [(4, 1.0)]
    assert not list(tmp_path.glob("events.*"))


def test_log_writes_images(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    with RunLog(tmp_path, Ranks()) as log:
        log.begin(Pace(0, 10, 1, 0))
        log.image(1, "batch", picture)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("images/batch")
    assert (image.width, image.height, image.step) == (12, 8, 1)


def test_log_warns_once_when_data_loading_is_slow(tmp_path, capsys):
    now = [0.0]
    with RunLog(tmp_path, Ranks()) as log:
        pace = Pace(0, 40, 2, 0, clock=lambda: now[0])
        for step, waiting in ((10, 9.0), (20, 2.0), (30, 4.0), (40, 9.0)):
            with pace.waiting():
                now[0] += waiting
            now[0] += 10 - waiting
            log.train(step, {"loss": 0.5}, [], pace)
    lines = capsys.readouterr().out.splitlines()
    # the first interval holds the start of the workers; a fifth is fine; two fifths are not
    assert [line for line in lines if "limited by data" in line] == [lines[4]]
    assert "40% of the time" in lines[4] and "data.num_workers" in lines[4] and "data.resize_on=device" in lines[4]


def test_log_writes_hparams(tmp_path):
    with RunLog(tmp_path, Ranks()) as log:
        log.begin(Pace(0, 10, 1, 0))
        log.hparams(
            {"optimizer.lr": 0.1, "model.backbone.weights": None, "trainer.compile": False}, {"AP": 0.5, "APs": None}
        )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.summary_metadata) >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_log_summary_shows_the_result_and_the_next_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(tmp_path / "runs" / "my demo", Ranks()) as log:
        log.summary("AP", 0.7, 300, ["fpn-det eval 'run=runs/my demo'"])
    result, *lines = capsys.readouterr().out.splitlines()
    assert result.startswith("Done in 0:00:0") and result.endswith(" Best AP 0.700 at step 300.")
    assert lines == [
        "  run folder   runs/my demo",
        "  TensorBoard  tensorboard --logdir 'runs/my demo'",
        "Next:",
        "  fpn-det eval 'run=runs/my demo'",
    ]
