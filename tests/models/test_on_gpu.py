"""The GPU path on a card: `make gpu`. What can be proven without one is in test_fake_cuda.py."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator

import pytest
import torch
from compare import assert_close
from test_detector import gradients, make_batch
from tiny import TINY

from fpn_det import api
from fpn_det.composition import compose
from fpn_det.data.flip_resize import FlipResize
from fpn_det.errors import SystemFault
from fpn_det.runs.checkpoint import find_checkpoint
from fpn_det.runtime import set_float32_precision
from fpn_det.structures import Batch
from fpn_det.training import memory
from fpn_det.training.optimization import Optimization

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS = 20
# Operators of a training step that torch has no deterministic version of; docs/gpu.md lists them.
NOT_DETERMINISTIC = {"max_pool2d_with_indices_backward_cuda"}
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    set_float32_precision(allow_tf32=False)
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def make_optimization(precision: str = "fp32") -> tuple[Optimization, Batch]:
    config = compose([*TINY, "device=cuda", f"precision={precision}", "trainer.ema=0.99", "trainer.clip_norm=1.0"])
    torch.manual_seed(0)
    model = config.build_model(3).cuda().train()
    recipe, schedule = config.build_recipe(), config.build_schedule()(steps=STEPS)
    optimization = Optimization(model, recipe.build(model, 2), schedule, precision, 1.0, 0.99)
    return optimization, make_batch().to(torch.device("cuda"))


def test_losses_and_gradients_equal_those_of_the_cpu():
    torch.manual_seed(0)
    on_cpu = compose([*TINY]).build_model(3).train()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    batch = make_batch()
    expected, found = gradients(on_cpu, batch), gradients(on_gpu, batch.to(torch.device("cuda")))
    for name, gradient in expected.items():
        if gradient is not None:
            assert_close(found[name].cpu(), gradient, 1e-3, name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_do_not_wait_for_the_device(precision: str):
    optimization, batch = make_optimization(precision)
    optimization.step([batch], 0)  # fills caches, chooses algorithms
    torch.cuda.set_sync_debug_mode("error")
    for step in range(1, STEPS + 1):
        losses = optimization.step([batch], step)
    torch.cuda.set_sync_debug_mode("default")
    assert int(optimization.alarm) == -1
    assert all(torch.isfinite(value) for value in losses[0].terms.values())


def test_one_rank_over_nccl_trains_as_without_a_process_group(shapes_dataset, tmp_path, monkeypatch):
    words = [*TINY, "device=cuda", f"data.root={shapes_dataset}", "data.check=false"]
    alone = api.train([*words, f"run_dir={tmp_path / 'alone'}"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    over_nccl = api.train([*words, f"run_dir={tmp_path / 'nccl'}"])
    expected, found = (find_checkpoint(str(run), "last")[1]["model"] for run in (alone, over_nccl))
    for name, tensor in expected.items():
        assert_close(found[name].cpu().float(), tensor.cpu().float(), 1e-3, name)


def test_batch_size_auto_trains(shapes_dataset, tmp_path):
    words = [*TINY, "device=cuda", f"data.root={shapes_dataset}", "data.check=false", "trainer.batch_size=auto"]
    run = api.train([*words, f"run_dir={tmp_path / 'run'}"])
    assert find_checkpoint(str(run), "last")[1]["progress"]["step"] == 2


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_on_the_device_equals_that_of_the_cpu(flip: bool, antialias: bool):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=generator)
    resize = FlipResize((45, 60), flip, "cv2", antialias)
    results = []
    for device in ("cpu", "cuda"):
        canvas = torch.zeros(96, 128, 3, dtype=torch.uint8, device=device)
        resize.apply_on_device(pixels.to(device), canvas[:45, :60])
        results.append(canvas.cpu().int())
    assert (results[0] - results[1]).abs().max() <= 1  # grey levels, due to interpolation


def test_out_of_memory_is_told_in_a_sentence_and_changes_nothing():
    optimization, batch = make_optimization()
    before = {name: weight.clone() for name, weight in optimization.parameters.items()}
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
    try:
        with pytest.raises(SystemFault, match=r"memory: expected room for 2 images .* Lower trainer\.batch_size"):
            memory.probe(optimization, batch, 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(before[name], weight) for name, weight in optimization.parameters.items())
    memory.probe(optimization, batch, 1)


def test_deterministic_mode_lacks_no_operator_but_the_listed(recwarn: pytest.WarningsRecorder):
    optimization, batch = make_optimization()
    torch.use_deterministic_algorithms(True, warn_only=True)
    optimization.step([batch], 0)
    words = "does not have a deterministic implementation"
    found = {str(each.message).split()[0] for each in recwarn if words in str(each.message)}
    assert found <= NOT_DETERMINISTIC
