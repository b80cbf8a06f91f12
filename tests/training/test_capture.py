from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from parts import TinyDetector, differences, make_batch, make_optimization, snapshot

from fpn_det.runtime import Ranks
from fpn_det.structures import Batch
from fpn_det.training import capture
from fpn_det.training.capture import CapturedSteps, CudaGraphs, make_step
from fpn_det.training.optimizers import SGD, AdamW

RECIPES = [SGD(lr=0.1, base_batch_size=None), AdamW(lr=0.01, base_batch_size=None)]


class RunAgain:
    """Stands for CUDA graphs: a replay runs the same work on the same slots, and overwrites the same results."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def on_stream(self):
        return nullcontext()

    def record(self, work):
        self.records += 1
        results: list = []

        def replay() -> None:
            self.replays += 1
            results[:] = work()

        return replay, results


def spoiled(batch: Batch) -> Batch:
    return replace(batch, pixels=torch.full_like(batch.pixels, 255), targets=batch.targets.__class__(
        batch.targets.boxes * float("nan"), batch.targets.labels, batch.targets.valid
    ))  # fmt: skip


def run(steps, batches) -> list[list[float]]:
    return [
        [value.item() for losses in steps(each, number) for value in losses.terms.values()]
        for number, each in enumerate(batches)
    ]


def make(recipe, precision: str = "fp32"):
    torch.manual_seed(0)
    return make_optimization(TinyDetector(), recipe, precision=precision, clip_norm=1.0, ema_decay=0.9)


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_replayed_steps_equal_ordinary_ones_to_the_bit(recipe, precision):
    batches = [[make_batch([k, k + 1]), make_batch([k + 2, k + 3])] for k in range(6)]
    batches.append([spoiled(make_batch([0, 1])), make_batch([2, 3])])  # after it nothing may move
    batches.append(batches[0])
    ordinary, captured = make(recipe, precision), make(recipe, precision)
    recorder = RunAgain()
    losses = run(CapturedSteps(captured, recorder, pytest.fail), batches)
    assert repr(losses) == repr(run(ordinary.step, batches))
    assert differences(snapshot(ordinary), snapshot(captured)) == []
    assert int(captured.alarm) == int(ordinary.alarm) == 6
    assert (recorder.records, recorder.replays) == (1, 7)


def test_each_shape_has_a_graph_and_too_many_are_told_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "MAX_GRAPHS", 2)
    recorder, told = RunAgain(), []
    steps = CapturedSteps(make(RECIPES[0]), recorder, told.append)
    sizes = [1, 2, 1, 2, 1, 3, 4, 3, 2]
    run(steps, [[make_batch(list(range(size)))] for size in sizes])
    assert (recorder.records, recorder.replays) == (2, 4)
    assert len(told) == 1 and "more than 2 shapes" in told[0] and "data.canvas=bucket" in told[0]


class Refuses(RunAgain):
    def record(self, work):
        work()  # as if it failed after part of the work
        raise RuntimeError("operation not permitted when stream is capturing")


def test_steps_that_cannot_be_captured_are_ordinary_and_the_reason_is_told_once():
    told: list[str] = []
    steps = CapturedSteps(make(RECIPES[0]), Refuses(), told.append)
    run(steps, [[make_batch([0, 1])]] * 4)
    assert told == [
        "trainer.capture: some steps are not captured as CUDA graphs: operation not permitted when stream is capturing."
    ]


def test_steps_on_several_ranks_are_ordinary(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    optimization = make(RECIPES[0])
    optimization.device = torch.device("cuda")
    monkeypatch.setattr(capture, "current_ranks", lambda: Ranks(world_size=2))
    assert [make_step(optimization, word, told.append) for word in ("auto", True)] == [optimization.step] * 2
    assert told == 2 * [
        "trainer.capture: steps are not captured as CUDA graphs: "
        "there are 2 ranks, of which one would capture a new shape while another replays."
    ]


def test_steps_without_a_gpu_are_ordinary():
    told: list[str] = []
    optimization = make(RECIPES[0])
    assert [make_step(optimization, word, told.append) for word in (False, "auto", True)] == [optimization.step] * 3
    assert told == [
        "trainer.capture: steps are not captured as CUDA graphs: CUDA graphs need a GPU, the device is cpu."
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_captured_steps_equal_ordinary_ones_on_a_gpu(recipe, precision):
    batches = [[make_batch([k, k + 1]).to("cuda")] for k in range(8)]
    results = []
    for is_captured in (False, True):
        torch.manual_seed(0)
        model = TinyDetector().cuda()
        optimization = make_optimization(model, recipe, precision=precision, clip_norm=1.0, ema_decay=0.9)
        steps = optimization.step
        if is_captured:
            steps = CapturedSteps(optimization, CudaGraphs(optimization.device), pytest.fail)
            for group in optimization.optimizer.param_groups:
                group["capturable"] = True
        results.append((run(steps, batches), snapshot(optimization)))
    for ordinary, captured in zip(results[0][0], results[1][0], strict=True):
        assert captured == pytest.approx(ordinary, rel=1e-4)
    for name, tensor in results[0][1].items():
        assert torch.allclose(tensor.float(), results[1][1][name].float(), rtol=1e-4, atol=1e-5), name
