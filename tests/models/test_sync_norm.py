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
