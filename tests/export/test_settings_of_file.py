"""The settings in an exported file are those that it was exported with."""

from __future__ import annotations

from tiny import TINY

from fpn_det.composition import compose, compose_as, from_saved, read_saved
from fpn_det.export.export import ExportConfig, settings_of

RESIZE = "{_target_: fpn_det.data.transforms.ResizeShortestSide, sides: [128], max_side: 256}"


def test_settings_of_a_file_are_those_of_the_run_with_what_the_export_changed():
    run = compose([*TINY, "precision=bf16"])
    words = (
        "model.roi_head.test_filter.max_detections=150",
        f"data.eval_transforms.resize={RESIZE}",
        "evaluation.max_dets=[1,10,150]",
        "tile.size=256",
        "precision=fp16",
    )
    config = compose_as(ExportConfig, "export", ["checkpoint=best.pt", *words], read_saved(run.to_yaml()))
    found = from_saved(settings_of(config, run))
    assert found.build_model(3).max_detections == 150
    assert found.data.eval_transforms["resize"]["sides"] == [128]
    assert list(found.evaluation.max_dets) == [1, 10, 150]
    assert found.tile.size == 256
    assert found.precision == "bf16" and found.trainer == run.trainer  # of the run
    assert found.data.train_transforms == run.data.train_transforms
