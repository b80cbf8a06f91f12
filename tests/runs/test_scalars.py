from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from fpn_det.runs.scalars import read_scalars


def test_scalars_of_a_resumed_run_are_there_once(tmp_path: Path):
    for first, purge in ((1, None), (3, 3)):
        writer = SummaryWriter(str(tmp_path), purge_step=purge, filename_suffix=f".{first}")
        for step in range(first, 5 if purge is None else 6):
            writer.add_scalar("train/loss", step / first, step)
        writer.close()
        # within a second, names are in the order of the writers up to the tenth of a process only
        (file,) = tmp_path.glob(f"*.{first}")
        file.rename(tmp_path / f"events.out.tfevents.{first}")
    points = read_scalars(tmp_path)["loss/loss"]
    assert [step for step, _ in points] == [1, 2, 3, 4, 5]
    assert [value for _, value in points] == pytest.approx([1, 2, 1, 4 / 3, 5 / 3])


def test_a_folder_without_event_files_has_no_scalars(tmp_path: Path):
    assert read_scalars(tmp_path) == read_scalars(tmp_path / "absent") == {}
