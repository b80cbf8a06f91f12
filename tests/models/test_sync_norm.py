from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_close

from fpn_det.models.layers import SyncBatchNorm2d


def example() -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    generator = torch.Generator().manual_seed(0)
    norm = SyncBatchNorm2d(5)
    norm.weight.data = torch.rand(5, generator=generator) + 0.5
    return torch.randn(6, 5, 4, 4, generator=generator) * 3 + 2, torch.randn(6, 5, 4, 4, generator=generator), norm


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images, weight, norm = example()
    part = slice(0, 4) if rank == 0 else slice(4, 6)  # uneven shares
    images = images[part].requires_grad_()
    output = norm(images)
    (output * weight[part]).sum().backward()
    torch.save(
        {
            "output": output.detach(),
            "input_gradient": images.grad,
            "weight_gradient": norm.weight.grad,
            "mean": norm.running_mean,
            "variance": norm.running_var,
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def offset_images() -> torch.Tensor:
    """Values whose mean is a thousand times their deviation."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, 8, 8, generator=generator, dtype=torch.float64) * 0.1 + 100


def work_on_extremes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    images = offset_images().float()
    parts = {
        "offset": images[:2] if rank == 0 else images[2:],
        "one rank without values": images if rank == 1 else images[:0],
        "a single value": torch.full((1 - rank, 5, 1, 1), 3.0),
        "no value": torch.zeros(0, 5, 1, 1),
    }
    for name, part in parts.items():
        norm = SyncBatchNorm2d(5)
        part = part.clone().requires_grad_()
        output = norm(part)
        output.square().sum().backward()
        results[name] = (output.detach(), part.grad, norm.running_mean, norm.running_var)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sync_norm_is_exact_where_the_mean_is_large_and_finite_where_values_are_few(tmp_path: Path):
    mp.spawn(work_on_extremes, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    norm = torch.nn.BatchNorm2d(5).double()
    expected = norm(offset_images().float().double()).detach()
    for name in ("offset", "one rank without values"):
        output = torch.cat([results[name][0] for results in ranks])
        assert_close(output.double(), expected, 1e-5)
        for _, _, mean, variance in (results[name] for results in ranks):
            assert_close(mean.double(), norm.running_mean, 1e-5)
            assert_close(variance.double(), norm.running_var, 1e-5)
    for name in ("a single value", "no value"):
        for tensors in (results[name] for results in ranks):
            assert all(tensor.isfinite().all() for tensor in tensors)
        mean, variance = ranks[0][name][2:]
        assert_close(mean, torch.full((5,), 0.3 if name == "a single value" else 0.0), 1e-5)
        assert_close(variance, torch.full((5,), 0.9 if name == "a single value" else 1.0), 1e-5)


def test_sync_norm_on_two_ranks_is_batch_norm_of_the_whole_batch(tmp_path: Path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    images, weight, source = example()
    norm = torch.nn.BatchNorm2d(5)
    norm.load_state_dict(source.state_dict())
    images.requires_grad_()
    output = norm(images)
    (output * weight).sum().backward()
    assert_close(torch.cat([part["output"] for part in parts]), output, 1e-5)
    assert_close(torch.cat([part["input_gradient"] for part in parts]), images.grad, 1e-5)
    assert_close(sum(part["weight_gradient"] for part in parts), norm.weight.grad, 1e-5)
    for part in parts:
        assert_close(part["mean"], norm.running_mean, 1e-6)
        assert_close(part["variance"], norm.running_var, 1e-5)
