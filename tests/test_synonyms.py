"""Words of users of other tools, typed at `train`: each is answered with the setting that is meant."""

from __future__ import annotations

import pytest
import yaml

from fpn_det.composition import compose, compose_as
from fpn_det.config import EvalConfig
from fpn_det.synonyms import SYNONYMS, VALUES, find_by_last_name

WORDS = {
    # ultralytics
    "epochs=3": "trainer.epochs",
    "batch=8": "trainer.batch_size",
    "imgsz=640": "data.train_transforms.resize.sides",
    "lr0=0.01": "optimizer.lr",
    "weights=yolov8n.pt": "init_from",
    "model=yolov8n.pt": "init_from=yolov8n.pt",
    "data=coco128.yaml": "data=yolo data.root=coco128.yaml",
    "device=0": "device=cuda:<number>",
    "device=0,1": "torchrun",
    "workers=8": "data.num_workers",
    "patience=50": "trainer.early_stop",
    "optimizer=SGD": "optimizer=sgd",
    "optimizer=AdamW": "optimizer=adamw",
    "amp=True": "precision=bf16",
    "cos_lr=True": "schedule=cosine",
    "momentum=0.9": "optimizer.momentum",
    "weight_decay=5e-4": "optimizer.weight_decay",
    "warmup_epochs=3": "schedule.warmup_steps",
    "freeze=10": "model.backbone.frozen_stages",
    "fraction=0.1": "data.max_images",
    "cache=True": "data.cache",
    "mosaic=1.0": "data.train_transforms.mosaic",
    "mixup=0.1": "data.train_transforms.mix_up",
    "fliplr=0.5": "data.train_transforms.flip.p",
    "conf=0.25": "model.roi_head.test_filter.score_threshold",
    "iou=0.7": "model.roi_head.test_filter.nms_iou",
    "max_det=300": "model.roi_head.test_filter.max_detections",
    "save_period=10": "trainer.save_every",
    "project=runs": "run_dir",
    "name=exp1": "run_dir",
    "exist_ok=True": "set_aside",
    "resume=True": "resume=auto",
    "pretrained=True": "model.backbone.weights",
    "classes=[cat,dog]": "data.classes",
    "nc=3": "data.classes",
    # detectron2
    "SOLVER.BASE_LR=0.02": "optimizer.lr",
    "SOLVER.IMS_PER_BATCH=16": "trainer.batch_size",
    "SOLVER.MAX_ITER=90000": "trainer.max_steps",
    "SOLVER.STEPS=[60000,80000]": "schedule.milestones",
    "SOLVER.WARMUP_ITERS=1000": "schedule.warmup_steps",
    "SOLVER.AMP.ENABLED=True": "precision=bf16",
    "MODEL.WEIGHTS=model_final.pkl": "init_from",
    "MODEL.DEVICE=cpu": "device",
    "MODEL.RESNETS.DEPTH=101": "model.backbone.depth",
    "MODEL.BACKBONE.FREEZE_AT=2": "model.backbone.frozen_stages",
    "MODEL.ROI_HEADS.NUM_CLASSES=3": "data.classes",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.5": "model.roi_head.test_filter.score_threshold",
    "MODEL.ANCHOR_GENERATOR.SIZES=[[32]]": "model.rpn.anchors.sizes",
    "INPUT.MIN_SIZE_TRAIN=[800]": "data.train_transforms.resize.sides",
    "DATALOADER.NUM_WORKERS=4": "data.num_workers",
    "DATASETS.TRAIN=[mine]": "data.train.annotations",
    "TEST.EVAL_PERIOD=5000": "trainer.eval_every",
    "OUTPUT_DIR=out": "run_dir",
    "num_gpus=8": "torchrun --nproc_per_node",
    # mmdetection
    "train_cfg.max_epochs=12": "trainer.epochs",
    "train_cfg.val_interval=1": "trainer.eval_every",
    "optim_wrapper.optimizer.lr=0.02": "optimizer.lr",
    "train_dataloader.batch_size=2": "trainer.batch_size",
    "load_from=checkpoint.pth": "init_from",
    "work_dir=out": "run_dir",
    "data_root=data": "data.root",
    "model.test_cfg.rcnn.score_thr=0.05": "model.roi_head.test_filter.score_threshold",
    "randomness.seed=1": "seed",
    # torchvision's references, lightning
    "lr=0.1": "optimizer.lr",
    "batch_size=8": "trainer.batch_size",
    "learning_rate=0.1": "optimizer.lr",
    "max_steps=100": "trainer.max_steps",
    "backbone=resnet18": "model.backbone.depth",
    "trainable_backbone_layers=3": "model.backbone.frozen_stages",
    # no synonym: the last part of a name of ours
    "ratios=[1]": "model.rpn.anchors.ratios",
    "clip_norm=1": "trainer.clip_norm",
}


@pytest.mark.parametrize(("word", "setting"), WORDS.items())
def test_words_of_other_tools_are_answered_with_the_setting_that_is_meant(word, setting):
    with pytest.raises(ValueError) as refusal:
        compose([word])
    text = str(refusal.value)
    assert setting in text and text.startswith(word.split("=")[0]) and len(text) < 250 and "\n" not in text


def test_every_setting_that_is_named_exists():
    tree = yaml.safe_load(compose().to_yaml())
    evaluation = {"tta.flip"}
    forms = {word for _, form in VALUES.values() for word in form.split(",")[0].split(" ")}
    assert len(WORDS) >= 50 and "data.root={value}" in forms
    for setting in (set(SYNONYMS.values()) | forms) - evaluation:
        name = setting.split("=")[0].split(" ")[0]
        if name == "torchrun":
            continue
        sections, _, last = name.rpartition(".")
        node = tree
        for section in sections.split(".") if sections else ():
            node = node[section]
        assert last in node or sections.endswith("_transforms"), name


def test_evaluation_is_answered_with_settings_that_it_has():
    for word, setting in {"batch=8": "data.eval_batch_size", "imgsz=640": "data.eval_transforms.resize.sides"}.items():
        with pytest.raises(ValueError, match=setting):
            compose_as(EvalConfig, "eval", ["checkpoint=x.pt", word])


def test_settings_are_found_by_their_last_name():
    tree = {"a": {"size": 1, "b": {"size": 2}}, "size": 3}
    assert find_by_last_name("x.size", tree) == ["a.size", "a.b.size", "size"]
