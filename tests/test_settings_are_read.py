"""No setting is ignored: each one is looked at by a run, or it says here who else reads it.

Arguments of classes (`_target_` nodes) are bound to signatures when settings are composed.
"""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass

import pytest
from tiny import TINY

from fpn_det.data.config import DataConfig, SplitConfig
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.training.config import EarlyStopping, TrainConfig, TrainerConfig

ELSEWHERE = {
    "TrainConfig.allow_targets": "the check of names, before there are settings",
    "DataConfig.root": "the paths that are made of it",
}
# so that what is read on demand is asked for
ASKED_FOR = (
    "trainer.max_steps=null",
    "trainer.epochs=2",
    "trainer.eval_every=2 steps",
    "trainer.early_stop={patience:3,min_delta:0.1}",
    "trainer.val_loss=true",
    "trainer.probe=true",
)


@pytest.fixture
def unread(monkeypatch) -> set[str]:
    """The names of settings that nobody has looked at yet. Copying them all, or checking them, is no look."""
    classes = (TrainConfig, DataConfig, SplitConfig, TrainerConfig, EarlyStopping, EvaluationConfig)
    names = {f"{kind.__name__}.{item.name}" for kind in classes for item in fields(kind)}

    def watch(kind: type) -> None:
        def look(record, name: str):
            caller = sys._getframe(1).f_code
            if caller.co_name != "__post_init__" and not caller.co_filename.endswith("dataclasses.py"):
                names.discard(f"{kind.__name__}.{name}")
            return object.__getattribute__(record, name)

        monkeypatch.setattr(kind, "__getattribute__", look)

    for kind in classes:
        assert is_dataclass(kind)
        watch(kind)
    return names


def test_every_setting_is_read_in_a_run(run_tool, shapes_dataset, unread):
    trained = run_tool("train.py", *TINY, f"data.root={shapes_dataset}", *ASKED_FOR)
    assert trained.returncode == 0, trained.stderr
    assert unread == set(ELSEWHERE)
