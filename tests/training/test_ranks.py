"""Two processes do the same job as one."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from compare import assert_close
from parts import TinyDetector, TinyLoader, differences, make_annotations, make_batch, make_optimization, snapshot

from fpn_det.annotations.config import SplitConfig
from fpn_det.data.config import DataConfig
from fpn_det.data.sampling import micro_batches
from fpn_det.errors import SystemFault, translate_system_errors
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.cascade import CascadeROIHead
from fpn_det.models.detector import Detector
from fpn_det.models.dynamic import DynamicROIHead
from fpn_det.models.layers import SyncBatchNorm2d
from fpn_det.models.necks.bifpn import BiFPN
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_align import RoIAlign
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.timm_backbone import TimmBackbone
from fpn_det.runs.checkpoint import CheckpointFolder
from fpn_det.runtime import Ranks, all_reduce_mean, broadcast_object, current_ranks, process_group, run_on_main
from fpn_det.structures import Batch, Proposals, Targets
from fpn_det.training.nonfinite import explain, first_bad_step, load_dump
from fpn_det.training.optimizers import SGD
from fpn_det.training.trainer import Trainer

SMALL = partial(TwoLayerHead, width=32)


def spawn(work, folder: Path, timeout_minutes: float = 1) -> list[dict]:
    """The results of `work(ranks, folder)` on two ranks."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    # not forked from this process: its other tests may have started threads of autograd, which do not survive a fork
    multiprocessing.set_forkserver_preload(["torch", "fpn_det.training.trainer"])
    torch.multiprocessing.start_processes(
        _join, (work, folder, port, timeout_minutes), nprocs=2, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _join(rank: int, work, folder: Path, port: int, timeout_minutes: float) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with process_group("cpu", timeout_minutes) as (ranks, _):
        torch.save(work(ranks, folder), folder / f"{rank}.pt")


def train(ranks: Ranks, folder: Path) -> dict[str, torch.Tensor]:
    """With a norm that sees the images of all ranks; without accumulation and with."""
    trained = {}
    for name, norm, accumulate in (("norm", SyncBatchNorm2d(4), 1), ("accumulate", SyncBatchNorm2d(4), 2)):
        torch.manual_seed(0)
        model = TinyDetector(norm=False)
        model.norm = norm
        optimization = make_optimization(model, clip_norm=1.0, ema_decay=0.9)
        batches = TinyLoader(batch_size=8, accumulate=accumulate, ranks=ranks).iterate(0)
        for step in range(4):
            optimization.step([next(batches) for _ in range(accumulate)], step)
        trained |= {f"{name}.{key}": tensor for key, tensor in snapshot(optimization).items()}
    return trained


def detect_and_learn(ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    """The losses of two steps of a real detector; of the four images only the first two have objects."""
    curves = {}
    for norm, accumulate, head in (
        ("sync", 1, ROIHead),
        ("sync", 2, ROIHead),
        ("frozen", 1, ROIHead),
        ("frozen", 2, ROIHead),
        ("frozen", 1, CascadeROIHead),
        ("frozen", 2, CascadeROIHead),
        ("frozen", 1, DynamicROIHead),
    ):
        torch.manual_seed(0)
        model = Detector(
            3,
            ResNet(18, norm=norm, frozen_stages=0),
            partial(FPN, channels=16),
            roi_head=partial(head, box_head=SMALL),
        )
        optimization = make_optimization(model.train(), SGD(lr=0.01, base_batch_size=None))
        curve = []
        for step in range(2):
            shares = micro_batches(torch.arange(4), ranks, accumulate).tolist()
            found = optimization.step([drawn(rows) for rows in shares], step)
            terms = torch.stack([torch.stack(list(losses.terms.values())) for losses in found]).mean(0)
            curve += all_reduce_mean(terms).tolist()
        curves[f"{head.__name__}, {norm}, accumulate {accumulate}"] = curve
    return curves


def learn_with_timm(ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    """Losses of two steps of a detector with a backbone of timm, whose batch norms see the images of all ranks."""
    torch.manual_seed(0)
    backbone = TimmBackbone("tf_efficientnet_lite0", norm="sync")
    model = Detector(3, backbone, partial(FPN, channels=16), roi_head=partial(ROIHead, box_head=SMALL))
    optimization = make_optimization(model.train(), SGD(lr=0.01, base_batch_size=None))
    curve = []
    for step in range(2):
        (rows,) = micro_batches(torch.arange(4), ranks, 1).tolist()
        (losses,) = optimization.step([drawn(rows)], step)
        curve += all_reduce_mean(torch.stack(list(losses.terms.values()))).tolist()
    return {"curve": curve}


def learn_without_rpn(ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    """Losses of three steps of detectors whose coarsest levels get no gradient."""
    curves = {}
    for name, neck in (("bifpn", partial(BiFPN, repeats=1, norm=None)), ("conv", partial(FPN, extra_method="conv"))):
        torch.manual_seed(0)
        model = Detector(
            3,
            ResNet(18, norm="frozen", frozen_stages=0),
            partial(neck, channels=16),
            rpn=None,
            roi_head=partial(ROIHead, box_head=SMALL, pooler=partial(RoIAlign, method="torchvision")),
        )
        optimization = make_optimization(model.train(), SGD(lr=0.01, base_batch_size=None))
        curve = []
        for step in range(3):
            (rows,) = micro_batches(torch.arange(4), ranks, 1).tolist()
            batch = drawn(rows)
            proposals = Proposals.stack([torch.tensor([[0.0, 0, 30, 30], [5, 5, 60, 40]])] * len(rows))
            (losses,) = optimization.step([dataclasses.replace(batch, proposals=proposals)], step)
            curve += all_reduce_mean(torch.stack(list(losses.terms.values()))).tolist()
        curves[name] = curve
    return curves


def drawn(rows: list[int]) -> Batch:
    """Images of noise with these numbers; those of rank 1 have no objects."""
    generators = [torch.Generator().manual_seed(row) for row in rows]
    corners = [
        torch.rand(2 * (row < 2), 2, generator=generator) * 30 for row, generator in zip(rows, generators, strict=True)
    ]
    boxes = [torch.cat([corner, corner + 25], dim=1) for corner in corners]
    pixels = torch.stack([torch.randint(0, 256, (3, 64, 64), generator=generator) for generator in generators])
    sizes = torch.tensor([[64, 64]] * len(rows))
    return Batch(
        pixels.byte(), sizes, sizes, Targets.pad(boxes, [torch.arange(len(box)) for box in boxes]), torch.tensor(rows)
    )


def one_bad_rank(ranks: Ranks, folder: Path) -> dict:
    optimization = make_optimization(TinyDetector(norm=False), ema_decay=0.9, precision="fp16")
    before = snapshot(optimization)
    batch = make_batch([2 * ranks.rank, 2 * ranks.rank + 1])
    bad = dataclasses.replace(batch, pixels=batch.pixels.float() * float("nan")) if ranks.rank == 1 else batch
    optimization.step([bad], 0)
    for step in (1, 2):
        optimization.step([batch], step)
    step = first_bad_step(optimization)
    after = snapshot(optimization)
    state = {"progress": {"step": step}}
    text = explain(optimization, [bad], make_annotations(4), step, 0, ranks, folder / "nan_dump", lambda: state)
    return {"before": before, "after": after, "step": step, "text": text}


def stopped_run(ranks: Ranks, folder: Path) -> dict:
    """Rank 1 alone is asked to stop, in the sixth step, then while it evaluates; then both go on."""
    from test_trainer import make_run

    def ask_to_stop() -> None:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def touch_sixth(step, batch):
        if step == 5:
            ask_to_stop()
        return batch

    def run(name: str, resume: str | None = None, **options) -> tuple[int, Trainer]:
        val_batches = [[0, 1], [2]] if ranks.is_main else [[3]]
        made = make_run(folder / name, resume, ranks=ranks, val_batches=val_batches, **options)
        return made.train(), made

    codes = [run("straight")]
    codes.append(run("stopped", touch=touch_sixth))
    codes.append(run("stopped", "auto", on_eval_batch=ask_to_stop))
    codes.append(run("stopped", "auto"))
    return {
        "codes": [code for code, _ in codes],
        "first_steps": [run.first_step for _, run in codes],
        "straight": snapshot(codes[0][1].optimization),
        "resumed": snapshot(codes[-1][1].optimization),
        "best": [(run.best.value, run.best.step) for _, run in codes],
    }


def unshared_folder(ranks: Ranks, folder: Path) -> dict:
    """A run is stopped and resumed, and rank 1 sees no checkpoint, as on a machine without a shared file system."""
    from test_trainer import make_run

    def stop(step, batch):
        if step == 5 and ranks.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    options = {"ranks": ranks, "val_batches": [[0, 1], [2]] if ranks.is_main else [[3]]}
    make_run(folder / "run", touch=stop, **options).train()
    if not ranks.is_main:
        CheckpointFolder.load = lambda self, warn, first=None: None  # type: ignore[method-assign]
    resumed = make_run(folder / "run", "auto", **options)
    return {"first_step": resumed.first_step, "weights": snapshot(resumed.optimization)}


def test_a_rank_that_sees_no_checkpoint_gets_the_state_of_rank_0(tmp_path):
    one, other = spawn(unshared_folder, tmp_path)
    assert one["first_step"] == other["first_step"] == 6
    assert differences(one["weights"], other["weights"]) == []


def read_data(ranks: Ranks, folder: Path) -> dict:
    """A sound data set, then one with a fault, which rank 1 never opens."""
    images = [{"id": row, "file_name": f"{row}.png", "height": 40, "width": 60} for row in range(4)]
    box = {"image_id": 2, "category_id": 3, "bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0}
    document = {"images": images, "annotations": [box | {"id": 1}], "categories": [{"id": 3, "name": "cat"}]}
    outcome = {}
    for name, objects in (("sound", [box | {"id": 1}]), ("faulty", [box | {"id": 1, "category_id": 9}])):
        path = folder / f"{name}.json"
        if ranks.is_main:
            path.write_text(json.dumps(document | {"annotations": objects}))
            for image in images:
                (folder / image["file_name"]).touch()
        split = SplitConfig(str(folder) if ranks.is_main else "nowhere", str(path) if ranks.is_main else "nowhere")
        config = DataConfig(train=split, val=split, check=False, keep_empty=True)
        try:
            data = config.read_train_and_val(0)
            truth = config.read_split("val", data.train.class_names, 0)
            outcome[name] = [data.train.digest(), data.val.digest(), truth.digest(), data.train.boxes.is_shared()]
        except ValueError as error:
            outcome[name] = str(error)
    return outcome


def test_rank_0_reads_the_data_for_all_ranks_and_its_refusal_is_theirs(tmp_path):
    one, other = spawn(read_data, tmp_path)
    assert one == other
    assert len(set(one["sound"][:3])) == 1 and one["sound"][3]
    assert "class_unknown" in one["faulty"]


def one_overflow(ranks: Ranks, folder: Path) -> dict:
    """Under fp16, the loss of rank 1 alone is not finite."""
    optimization = make_optimization(TinyDetector(norm=False), precision="fp16")
    batch = make_batch([2 * ranks.rank, 2 * ranks.rank + 1])
    bad = dataclasses.replace(batch, pixels=batch.pixels.float() * float("nan")) if ranks.rank == 1 else batch
    optimization.step([bad], 0)
    return {"alarm": int(optimization.alarm), "scale": float(optimization.scale.value)}


def test_a_bad_loss_of_one_rank_is_no_overflow_on_the_others(tmp_path):
    assert spawn(one_overflow, tmp_path) == [{"alarm": 0, "scale": 2.0**16}] * 2


def failing_choice(ranks: Ranks, folder: Path) -> dict:
    def choose() -> str:
        raise ValueError("only rank 0 knows")

    with pytest.raises(ValueError, match="only rank 0 knows"):
        run_on_main(choose)
    return {"same": run_on_main(lambda: f"chosen by {current_ranks().rank}")}


def everything(ranks: Ranks, folder: Path) -> dict:
    """All in one pair of processes, because starting them takes longest."""
    return {
        work.__name__: work(ranks, folder)
        for work in (train, detect_and_learn, one_bad_rank, stopped_run, failing_choice)
    }


def lost_rank(ranks: Ranks, folder: Path) -> dict:
    """Rank 1 is killed while rank 0 waits for it, by each kind of exchange."""
    if not ranks.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher follows
    said = []
    for exchange in (lambda: all_reduce_mean(torch.ones(1)), lambda: broadcast_object(1)):
        with pytest.raises(SystemFault) as caught, translate_system_errors(lambda: "Rescue."):
            exchange()
        said.append(str(caught.value))
    torch.save(said, folder / "0.pt")
    return {}


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(ranks_folder) -> list[dict]:
    return spawn(everything, ranks_folder)


def test_two_ranks_train_as_one(two_ranks, tmp_path):
    one = train(Ranks(), tmp_path)
    # the gradient of a bias in front of a batch norm is zero up to rounding, so the largest momentum is the magnitude
    momentum = max(tensor.abs().max().item() for name, tensor in one.items() if name.endswith("momentum_buffer"))
    for result in two_ranks:
        for name, tensor in result["train"].items():
            magnitude = momentum if name.endswith("momentum_buffer") else None
            assert_close(tensor, one[name], 1e-4, name, magnitude)


def test_a_detector_learns_the_same_on_two_ranks_of_which_one_has_no_objects(two_ranks, tmp_path):
    one = detect_and_learn(Ranks(), tmp_path)
    for result in two_ranks:
        for name, curve in result["detect_and_learn"].items():
            assert curve == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    for head in ("ROIHead", "CascadeROIHead"):
        expected = one[f"{head}, frozen, accumulate 1"]
        assert one[f"{head}, frozen, accumulate 2"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_detector_without_rpn_learns_the_same_on_two_ranks(tmp_path):
    one, other = spawn(learn_without_rpn, tmp_path)
    expected = learn_without_rpn(Ranks(), tmp_path)
    for name, curve in expected.items():
        assert one[name] == other[name]
        assert_close(torch.tensor(one[name]), torch.tensor(curve), 1e-5, name)


@pytest.mark.slow
def test_a_detector_with_a_backbone_of_timm_learns_the_same_on_two_ranks(tmp_path):
    pytest.importorskip("timm", reason="needs the extra timm")
    one, other = spawn(learn_with_timm, tmp_path)
    expected = learn_with_timm(Ranks(), tmp_path)
    assert one["curve"] == other["curve"]
    assert one["curve"] == pytest.approx(expected["curve"], rel=1e-3, abs=1e-5)


def test_bad_loss_on_one_rank_stops_all(two_ranks, ranks_folder):
    for rank, result in enumerate(two_ranks):
        found = result["one_bad_rank"]
        assert all(torch.equal(found["before"][name], found["after"][name]) for name in found["before"]), rank
        assert found["step"] == 0
        assert found["text"].startswith(
            "not finite: pixels of image_2.jpg, pixels of image_3.jpg, roi_class=nan, roi_box=nan. First bad output: conv. "
            "Images of that batch: image_2.jpg, image_3.jpg. "
        )
    for rank, examined in ((0, []), (1, [0, 1])):
        state, share, (batch,) = load_dump(ranks_folder / "nan_dump", rank)
        assert state["progress"]["step"] == 0 and share["rank"] == rank
        assert share["examinations"][0]["images"] == examined
        assert batch.indices.tolist() == [2 * rank, 2 * rank + 1]


def test_signal_to_one_rank_stops_all_and_the_run_goes_on_to_the_bit(two_ranks):
    for rank, result in enumerate(two_ranks):
        found = result["stopped_run"]
        assert found["codes"] == [0, 143, 143, 0]
        assert found["first_steps"] == [0, 0, 6, 8]
        assert found["best"][0] == found["best"][3]
        for name, tensor in found["straight"].items():
            # each rank gathers statistics for itself, and goes on with those of rank 0: only these are ever used
            assert torch.equal(tensor, found["resumed"][name]) or (rank and name.startswith("model.norm.running")), name


def test_rank_0_decides_for_all(two_ranks):
    assert [result["failing_choice"]["same"] for result in two_ranks] == ["chosen by 0"] * 2


def test_loss_of_a_rank_is_told_at_once(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        spawn(lost_rank, tmp_path)
    for text in torch.load(tmp_path / "0.pt"):
        assert text.startswith("distributed: expected all ranks to respond, but one has exited or hangs (")
        assert text.endswith("check the memory. Rescue.")


def slow_main(ranks: Ranks, folder: Path) -> dict:
    run_on_main(lambda: time.sleep(8))
    return {"done": True}


@pytest.mark.slow
def test_work_that_rank_0_does_for_all_may_take_longer_than_the_timeout(tmp_path):
    assert spawn(slow_main, tmp_path, timeout_minutes=0.1) == [{"done": True}] * 2
