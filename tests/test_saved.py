"""What older versions saved is read by this one: `old_runs/<version>.yaml` is the config.yaml of a run of that version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fpn_det.assembly import check_parts
from fpn_det.config import Settings, check, compose
from fpn_det.runtime import Ranks
from fpn_det.saved import read_yaml, to_yaml

CPU = torch.device("cpu")
OLD = Path(__file__).parent / "old_runs"


@pytest.mark.parametrize("file", sorted(OLD.iterdir()), ids=lambda file: file.stem)
def test_settings_of_an_old_run_load_and_build(file):
    told: list[str] = []
    settings = check(read_yaml(file.read_text(), told.append), (), Settings)
    check_parts(settings, Ranks(), CPU)
    assert settings.experiment == "demo" and settings.trainer.ema == 0.9
    assert told[0].startswith("Not in the saved settings, so as in configs/: ") and "trainer.probe" in told[0]
    assert settings.trainer.probe is compose().trainer.probe
    assert settings.model["neck"]["extra_levels"] == 1 and "extra_level" not in settings.model["neck"]


def test_settings_of_now_lack_nothing():
    told: list[str] = []
    read_yaml(to_yaml(compose(["experiment=demo", "~data.train_transforms.flip"])), told.append)
    assert told == []


def test_a_saved_setting_that_is_unknown_is_refused():
    text = to_yaml(compose(["experiment=demo"])).replace("ema: null", "ema: null\n  emma: 1")
    with pytest.raises(
        ValueError, match=r"trainer\.emma: there is no setting of that name. Did you mean trainer\.ema\?"
    ):
        check(read_yaml(text), (), Settings)
