from __future__ import annotations

from fpn_det.evaluation.coco import Evaluation
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.runs.tags import present_tag, tag_evaluation, tag_steps


def test_tags_put_ap_loss_lr_and_speed_first_and_levels_last():
    steps = {"loss": 1.0, "rpn_box": 0.5, "rois/P2": 17.0, "rpn/positive_anchors": 3.0, "lr": 0.1}
    steps |= {
        "grad_norm": 2.0,
        "loss_scale": 8.0,
        "memory_mib": 9.0,
        "images_per_s": 4.0,
        "data_s": 0.1,
        "bad_files": 1,
    }
    row = {"AP": 0.25, "AP50": 0.5, "AR": None, "objects": 3}
    evaluation = Evaluation(
        {"AP": 0.25, "AR100": None, "loss": 1.5},
        {"disk": row},
        40,
        100,
        0,
        DetectionTable.join([]),
        {"detections/P2": 4.5, "val_loss/rpn_box": 0.75},
        1.0,
    )
    tagged = tag_steps(steps) | tag_evaluation(evaluation)
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in sorted(tagged)))
    assert groups == ["AP", "loss", "lr", "machine", "optimizer", "per_class_AP", "pyramid"]
    assert {name: value for name, value in tagged.items() if name.startswith(("AP/", "loss/val"))} == {
        "AP/AP": 0.25,
        "AP/AR100": None,
        "loss/val_loss": 1.5,
        "loss/val_rpn_box": 0.75,
    }
    assert tagged["pyramid/rois/P2"] == 17.0 and tagged["pyramid/detections/P2"] == 4.5
    assert len(tagged) == len(steps) + 6


def test_curves_of_earlier_versions_have_the_present_names():
    earlier = ["train/loss", "train/rpn_box", "train/lr", "train/images_per_s", "val/AP50", "val/loss", "rois/P2"]
    present = ["loss/loss", "loss/rpn_box", "lr", "machine/images_per_s", "AP/AP50", "loss/val_loss", "rois/P2"]
    assert [present_tag(tag) for tag in earlier] == present
    assert present_tag("loss/loss") == "loss/loss"
