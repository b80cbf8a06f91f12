"""Wrong command lines: each is refused in one sentence that names the setting, before a folder is made or data are read."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY

from fpn_det.composition import compose, compose_as, read_saved
from fpn_det.config import EvalConfig
from fpn_det.data.tiles import Tiling
from fpn_det.runtime import Ranks, process_group
from fpn_det.training.trainer import Trainer

CPU = torch.device("cpu")
EARLY_STOP = "trainer.early_stop={patience:3,min_delta:0}"

# What composition refuses.
COMPOSED = [
    # names
    ("trainer.epoch=3", "trainer.epoch: there is no setting of that name. Did you mean trainer.epochs?"),
    ("+trainer.epoch=3", "Did you mean trainer.epochs?"),
    ("++trainer.epoch=3", "Did you mean trainer.epochs?"),
    ("trainr.epochs=3", "Did you mean trainer.epochs?"),
    ("+typo=1", "typo: there is no setting of that name. Known here: model, data, evaluation"),
    ("data.train.image=x", "Did you mean data.train.images?"),
    ("data.train_transforms.resize.side=[640]", "Did you mean data.train_transforms.resize.sides?"),
    ("data.train_transforms.rezise=null", "Did you mean data.train_transforms.resize?"),
    ("model.backbone.dept=18", "Did you mean model.backbone.depth?"),
    ("+model.backbone.dept=18", "Did you mean model.backbone.depth?"),
    ("model.rpn.anchors.size=[3]", "Did you mean model.rpn.anchors.sizes?"),
    ("++optimizer.learning_rate=0.1", "optimizer.learning_rate: there is no setting of that name. Known here: lr,"),
    ("++evaluation.maxdets=[1]", "Did you mean evaluation.max_dets?"),
    ("optimizer.betas=[0.9,0.99]", "optimizer.betas: there is no setting of that name."),
    ("+model.num_classes=3", "model.num_classes: follows from other settings and cannot be set."),
    ("+model.neck.in_channels=[1]", "model.neck.in_channels: follows from other settings and cannot be set."),
    ("+schedule.steps=9", "schedule.steps: follows from other settings and cannot be set."),
    (
        "+data.train_transforms.blur={_target_:albumentations.Blur,blurlimit:3}",
        "Did you mean data.train_transforms.blur.blur_limit?",
    ),
    # groups and files
    ("experiment=dem", "experiment: expected one of bccd,"),
    ("neck=fpm", "neck: expected one of bifpn, bottom_up, "),
    ("optimizer=adam", "optimizer: expected one of adamw or sgd, got 'adam'. Did you mean adamw?"),
    ("schedule=cosinus", "Did you mean cosine?"),
    (
        "box_loss=ciou",
        "box_loss: expected the part that it is for, got none or another. Set "
        "box_loss@model.roi_head.box_loss=ciou or box_loss@model.rpn.box_loss=ciou.",
    ),
    ("box_loss@roi_head=ciou", "Set box_loss@model.roi_head.box_loss=ciou or box_loss@model.rpn.box_loss=ciou."),
    ("cls_loss=weighted_cross_entropy", "Set cls_loss@model.roi_head.cls_loss=weighted_cross_entropy."),
    ("objectness_loss=focal", "Set objectness_loss@model.rpn.cls_loss=focal."),
    (
        "roi_head/box_head=conv5",
        "roi_head/box_head: expected the part that it is for, got none or another. Set "
        "roi_head/box_head@model.roi_head.box_head=conv5.",
    ),
    ("box_loss@model.rpn.box_loss=cio", "box_loss: expected one of ciou, diou, "),
    (
        "model.roi_head.box_loss=ciou",
        "model.roi_head.box_loss: expected a class by name (_target_), got the name of a "
        "file. Set box_loss@model.roi_head.box_loss=ciou.",
    ),
    ("model.neck=bifpn", "Set neck=bifpn."),
    # deletions
    ("~trainer.epochs", "trainer.epochs: expected a value, got none: a setting cannot be deleted."),
    ("~model.rpn.anchors", "model.rpn.anchors: expected a value, got none"),
    ("~optimizer", "optimizer: expected a value, got none"),
    # types
    ("trainer.epochs=abc", "trainer.epochs: expected a number more than 0 or null, got 'abc'."),
    ("trainer.compile=yes", "trainer.compile: expected true or false, got 'yes'."),
    ("trainer.batch_size=4.5", "trainer.batch_size: expected a whole number at least 1 or auto, got 4.5."),
    ("trainer.early_stop=true", "trainer.early_stop: expected {patience: ..., min_delta: ...} or null, got True."),
    ("seed=1e3", "seed: expected a whole number, got 1000.0."),
    ("data.root=null", "data.root: expected a string, got null."),
    ("data.classes=cat", "data.classes: expected a list, each item a string or null, got 'cat'."),
    ("data.canvas=[640]", "data.canvas: expected batch or bucket or a list of 2 values, got [640]."),
    ("model.rpn.sampler.num_samples=many", "model.rpn.sampler.num_samples: expected a whole number, got 'many'."),
    ("model.backbone=null", "model.backbone: expected a class by name (Backbone, as _target_), got null."),
    ("optimizer.lr=null", "optimizer.lr: expected a number, got null."),
    # ranges
    ("trainer.batch_size=0", "trainer.batch_size: expected a whole number at least 1 or auto, got 0."),
    ("trainer.max_steps=-1", "trainer.max_steps: expected a whole number at least 1 or null, got -1."),
    ("trainer.epochs=nan", "trainer.epochs: expected a number more than 0 or null, got nan."),
    ("trainer.clip_norm=inf", "trainer.clip_norm: expected a number more than 0 or null, got inf."),
    ("trainer.ema=1", "trainer.ema: expected a number more than 0 and less than 1 or null, got 1."),
    ("trainer.keep_last=-1", "trainer.keep_last: expected a whole number at least 0, got -1."),
    ("optimizer.lr=0", "optimizer.lr: expected a number more than 0, got 0."),
    ("optimizer.lr=nan", "optimizer.lr: expected a number more than 0, got nan."),
    ("optimizer.momentum=1", "optimizer.momentum: expected a number at least 0 and less than 1, got 1."),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay: expected a number at least 0, got -1."),
    (
        "schedule.milestones=[60000,80000]",
        "schedule.milestones.0: expected a number more than 0 and less than 1, got 60000.",
    ),
    ("schedule.warmup_factor=2", "schedule.warmup_factor: expected a number between 0 and 1, got 2."),
    (
        "model.rpn.sampler.positive_fraction=1.5",
        "model.rpn.sampler.positive_fraction: expected a number between 0 and 1, got 1.5.",
    ),
    (
        "model.roi_head.test_filter.max_detections=0",
        "model.roi_head.test_filter.max_detections: expected a whole number at least 1, got 0.",
    ),
    ("model.neck.channels=-1", "model.neck.channels: expected a whole number at least 1, got -1."),
    ("data.val_fraction=1", "data.val_fraction: expected a number more than 0 and less than 1 or null, got 1."),
    ("data.num_workers=-1", "data.num_workers: expected a whole number at least 0, got -1."),
    ("evaluation.max_dets=[100,10]", "evaluation.max_dets: expected growing numbers"),
    (
        "evaluation.area_ranges.s=[9,1]",
        "evaluation.area_ranges.s: expected [smallest, largest] in px^2, got [9.0, 1.0].",
    ),
    # words of a few
    ("precision=fp8", "precision: expected one of fp32, tf32, bf16 or fp16, got 'fp8'."),
    ("data.on_error=ignore", "data.on_error: expected one of fail, fix or skip, got 'ignore'."),
    (
        "model.neck.norm=gruop",
        "model.neck.norm: expected frozen, fixed_statistics, batch, sync or group or null, got 'gruop'.",
    ),
    ("model.rpn.train_filter.nms_method=fast", "model.rpn.train_filter.nms_method: expected one of auto,"),
    ("trainer.best_metric=mAP", "trainer.best_metric: expected one of AP, AP50, AP75, APs, "),
    # what may be built
    (
        "model._target_=os.system",
        "model._target_: expected a class of fpn_det.models, fpn_det.boxes, fpn_det.interop, fpn_det.data.transforms, fpn_det.data.mixing, "
        "fpn_det.training.optimizers, fpn_det.training.schedule, albumentations or torch.optim, got 'os.system'.",
    ),
    (
        "model.backbone={_target_:torch.hub.load,repo_or_dir:x,model:y}",
        "model.backbone._target_: expected a class of",
    ),
    ("model.backbone._target_=torch.hub.load", "model.backbone._target_: expected a class of"),
    ("model.backbone._target_=builtins.eval", "model.backbone._target_: expected a class of"),
    ("model.backbone._target_=fpn_det.errors.sys", "model.backbone._target_: expected a class of"),
    (
        "model.backbone._target_=fpn_det.models.resnet.ResNot",
        "model.backbone._target_: fpn_det.models.resnet has no class 'ResNot'.",
    ),
    (
        "+data.train_transforms.evil={_target_:subprocess.Popen,args:[ls]}",
        "data.train_transforms.evil._target_: expected a class of",
    ),
    (
        "+data.train_transforms.evil={_target_:albumentations.Blur,p:{_target_:os.abort}}",
        "data.train_transforms.evil.p._target_: expected",
    ),
    # combinations
    ("trainer.epochs=3 trainer.max_steps=3", "trainer.epochs: expected this or trainer.max_steps, got both."),
    ("trainer.epochs=null", "trainer: expected a length, got none. Set trainer.epochs or trainer.max_steps."),
    ("resume=runs/x init_from=x.pt", "init_from: has no effect here: resume continues from the run's own weights."),
    ("data.val_fraction=0.1 data.val.images=x", "data.val_fraction: expected this or data.val, got both."),
    ("data.val.annotations=null", "data.val: expected images and annotations, got none."),
    ("data.classes=[cat,cat]", "data.classes: expected names, each once, got ['cat', 'cat']."),
    ("trainer.accumulate=3", "trainer.batch_size: expected a multiple of trainer.accumulate=3, got 16."),
    ("model.roi_head=null", "evaluation: expected proposals of a model without an ROI head, got detections."),
    ("model.rpn=null", "data.proposals: expected with model.rpn=null only, and then always."),
    (
        "data.proposals={train:a,val:b,test:null,train_limit:9,eval_limit:9}",
        "data.proposals: expected with model.rpn=null only",
    ),
    ("experiment=fast_rcnn_r50_fpn data.proposals.val=a", "data.proposals.train: expected a value, got none."),
    (
        "experiment=fast_rcnn_r50_fpn data.proposals.train=a data.proposals.val=a evaluation=proposals trainer.best_metric=AR100",
        "evaluation: expected detections of a model without an RPN, got proposals.",
    ),
    (EARLY_STOP, "trainer.early_stop: expected evaluations during training, got none."),
    # what would change nothing
    ("run=runs/x experiment=demo", "experiment: has no effect here: all settings come from run"),
    ("set_aside=true", "set_aside: has no effect here"),
    ("set_aside=true run_dir=x resume=auto", "set_aside: has no effect here"),
    ("schedule.warmup_steps=0 schedule.warmup_factor=0.1", "schedule.warmup_factor: has no effect here"),
    ("data.tile.min_visible=0.5", "data.tile.min_visible: has no effect here: data.tile.size=null cuts no tiles."),
    ("data.tile.empty_share=0.5", "data.tile.empty_share: has no effect here: data.tile.size=null cuts no tiles."),
    ("tile.overlap=0.5", "tile.overlap: has no effect here: there are no tiles without tile.size."),
    (
        "data.tile.size=64 data.tile.overlap=1.0",
        "data.tile.overlap: expected a number at least 0 and less than 1, got 1.0.",
    ),
    ("experiment=rpn_r50_fpn roi_head=cascade", "roi_head: has no effect here: model.roi_head is null. Leave it out."),
    (
        "experiment=paper/table1_c box_loss@model.roi_head.box_loss=ciou",
        "box_loss@model.roi_head.box_loss: has no effect here: model.roi_head is null.",
    ),
    (
        "roi_head=null",
        "roi_head: expected the name of a file in configs/roi_head, got null. Leave it out; to leave out a part",
    ),
    (
        "experiment=small optimizer=adamw",
        "optimizer.lr: expected a value for AdamW, got 0.02, which the experiment states for SGD. Set optimizer.lr=... too.",
    ),
    (
        "experiment=r50_fpn_rsb optimizer=sgd optimizer.lr=0.02",
        "optimizer.weight_decay: expected a value for SGD, got 0.05, which the experiment states for AdamW.",
    ),
    (
        "experiment=small backbone=efficientnet_lite0",
        "in_channels. These do not go together: experiment=small, backbone=efficientnet_lite0.",
    ),
    (
        "roi_head=dynamic box_loss@model.roi_head.box_loss=ciou",
        "These do not go together: roi_head=dynamic, box_loss@model.roi_head.box_loss=ciou.",
    ),
    ("hydra.job.chdir=true", "hydra.job.chdir: has no effect here"),
    ("hydra.run.dir=x", "hydra.run.dir: has no effect here: the folder of a run is run_dir=<folder>."),
    # the form of the command line
    ("trainer.early_stop.patience=3", "trainer.early_stop: is null, so it has no patience."),
    ("trainer.epochs.x=1", "trainer.epochs: is 12.28, so it has no x. Set it as a whole: trainer.epochs=..."),
    ("resume", "command line: expected name=value, got 'resume'."),
    ("--epochs=3", "command line: expected name=value, got '--epochs=3'."),
    ("data.root=a=b", "command line: expected name=value, got 'data.root=a=b'."),
    (
        "trainer.epochs=3,4",
        "command line: Ambiguous value for argument 'trainer.epochs=3,4'. Use -m to try them in turn",
    ),
    ("data.train.images=???", "data.train.images: expected a value, got none."),
    (
        "data.train.images=${data.rot}",
        "data.train.images: expected a value, got none: Interpolation key 'data.rot' not found.",
    ),
]

# What the parts refuse, in the demo made small.
BUILT = [
    ("model.backbone.depth=17", "backbone.depth: expected one of 18, 34, 50, 101, got 17."),
    (
        "model.backbone.norm=frozen",
        "model.backbone: expected trained weights under norm=frozen and frozen_stages=0, got random ones.",
    ),
    (
        "model.backbone.frozen_stages=2",
        "model.backbone: expected trained weights under norm=batch and frozen_stages=2, got random ones.",
    ),
    ("model.backbone.weights=nowhere.pth", "nowhere.pth. Give another path, or set model.backbone.weights=null."),
    (
        "model.rpn.anchors.sizes=[32,64]",
        "anchors.sizes: expected one size (or one list of equal length) for each of 5 levels",
    ),
    ("model.rpn.anchors.ratios=[]", "anchors.ratios: expected at least one"),
    ("model.rpn.matcher.negative_iou=0.8", "matcher: expected 0 <= negative_iou <= positive_iou <= 1"),
    ("model.roi_head.pooler.sampling_ratio=0", "pooler: sampling_ratio 0 has no fixed number of points."),
    (
        "model.rpn._target_=fpn_det.interop.conventions.SampledRPN trainer.accumulate=2",
        "model.rpn: expected losses divided by a constant with trainer.accumulate=2, got SampledRPN",
    ),
    (
        "optimizer=sgd optimizer.lr=0.01 optimizer.momentum=0 optimizer.nesterov=true",
        "optimizer.nesterov: expected momentum",
    ),
    (
        "schedule=multistep schedule.milestones=[0.9,0.3]",
        "schedule.milestones: expected increasing fractions of the run, got [0.9, 0.3].",
    ),
    (
        "data.train_transforms.flip.p=2",
        "data.train_transforms.flip: albumentations.HorizontalFlip refuses its arguments: p Input should be less",
    ),
    (
        "+data.train_transforms.blur={p:0.1}",
        "data.train_transforms.blur: expected a class by name (_target_), got none.",
    ),
    ("data.canvas=[100,100]", "data.canvas: expected sides that the model's stride 32 divides, got [100, 100]."),
    (
        "model.rpn=null data.proposals={train:nowhere.json,val:x,test:null,train_limit:9,eval_limit:9}",
        "data.proposals.train: expected a file in the COCO results format, got nowhere.json, which does not exist.",
    ),
    ("init_from=nowhere.pt", "init_from: expected a file of weights, got nowhere.pt, which does not exist."),
    ("trainer.batch_size=auto", "trainer.batch_size: expected a number on cpu, got auto"),
    ("device=gpu", "device: expected auto, cpu, cuda, cuda:<number> or mps, got 'gpu'."),
    ("device=cuda:99", "device: 'cuda:99'"),
]


def assert_is_a_sentence(refusal: str, words: str) -> None:
    assert words in refusal
    assert "\n" not in refusal
    assert "+trainer" not in refusal  # Hydra's advice, which would be wrong


@pytest.mark.parametrize(("overrides", "words"), COMPOSED)
def test_a_wrong_command_line_is_refused(overrides, words):
    with pytest.raises(ValueError) as refusal:
        compose(overrides.split(" "))
    assert_is_a_sentence(str(refusal.value), words)


@pytest.mark.parametrize(("overrides", "words"), BUILT)
def test_parts_refuse_before_data_are_read(overrides, words):
    config = compose([*TINY, *overrides.split(" ")])
    with pytest.raises(ValueError) as refusal, process_group(config.device, timeout_minutes=1) as (ranks, device):
        Trainer(config, ranks, device)
    assert_is_a_sentence(str(refusal.value), words)


def test_ranks_must_divide_the_batch():
    with pytest.raises(
        ValueError,
        match=r"trainer\.batch_size: expected a multiple of ranks x trainer\.accumulate = 3, got 4\. Use 3\.",
    ):
        Trainer(compose(TINY), Ranks(0, 3), CPU)


def test_a_good_command_line_passes():
    config = compose(
        [
            *TINY,
            "~data.train_transforms.flip",
            "set_aside=false",
            "schedule.warmup_factor=0.1",
            EARLY_STOP,
            "trainer.eval_every=1 step",
        ]
    )
    Trainer(config, Ranks(), CPU)


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=0.1", "schedule.gamma=0.5", "init_from=x.pt", "profile=true", "data.train_transforms.flip=null"],
)
def test_evaluation_refuses_what_only_training_reads(override):
    saved = read_saved(compose(TINY).to_yaml())
    compose_as(EvalConfig, "eval", ["checkpoint=x.pt"], saved)
    name = override.split("=")[0]
    with pytest.raises(ValueError, match=rf"{name.split('.')[0]}.*: has no effect here: nothing is trained here"):
        compose_as(EvalConfig, "eval", ["checkpoint=x.pt", override], saved)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("model.roi_head.test_filter.max_detections=3", "model"),
        ("weights=raw", "weights"),
        ("++precision=bf16", "precision"),
    ],
)
def test_settings_that_an_exported_file_has_fixed_are_refused(word, name):
    saved = read_saved(compose(TINY).to_yaml())
    with pytest.raises(ValueError, match=rf"^{name}: has no effect here: it is fixed in best\.onnx\. Leave it out"):
        compose_as(EvalConfig, "eval", ["checkpoint=best.onnx", word], saved)
    compose_as(EvalConfig, "eval", ["checkpoint=best.pt", word], saved)
    compose_as(EvalConfig, "eval", ["checkpoint=best.onnx", "split=test", "data.root=x"], saved)


def test_evaluation_refuses_classes_of_its_own():
    """All classes of the checkpoint would be evaluated all the same."""
    saved = read_saved(compose([*TINY, "data.classes=[square]"]).to_yaml())
    with pytest.raises(
        ValueError, match=r"^data\.classes: has no effect here: the classes are those of the checkpoint"
    ):
        compose_as(EvalConfig, "eval", ["checkpoint=best.pt", "data.classes=[disk]"], saved)
    assert compose_as(EvalConfig, "eval", ["checkpoint=best.pt"], saved).data.classes == ["square"]
    # the file may then lack some of them
    assert compose_as(EvalConfig, "eval", ["checkpoint=best.pt", "data.classes=null"], saved).data.classes is None


def test_evaluation_refuses_to_choose_parts_of_the_model():
    saved = read_saved(compose(TINY).to_yaml())
    with pytest.raises(ValueError, match=r"^roi_head: expected settings by name, got a choice of a file, where all"):
        compose_as(EvalConfig, "eval", ["checkpoint=best.pt", "roi_head=cascade"], saved)


def test_evaluation_uses_the_tiles_of_training_unless_it_has_its_own():
    saved = read_saved(compose([*TINY, "data.tile.size=64", "data.tile.overlap=0.4"]).to_yaml())
    for words, expected in (
        ([], Tiling(64, 0.4)),
        (["tile.size=80"], Tiling(80, 0.4)),
        (["tile.size=80", "tile.overlap=0.1"], Tiling(80, 0.1)),
        (["tile.size=null"], None),
    ):
        assert compose_as(EvalConfig, "eval", ["checkpoint=x.pt", *words], saved).tiling == expected
    plain = read_saved(compose(TINY).to_yaml())
    assert compose_as(EvalConfig, "eval", ["checkpoint=x.pt"], plain).tiling is None
    assert compose_as(EvalConfig, "eval", ["checkpoint=x.pt", "tile.size=80"], plain).tiling == Tiling(80)
    with pytest.raises(
        ValueError, match=r"data\.tile: has no effect here: the tiles of an evaluation are tile\.size and"
    ):
        compose_as(EvalConfig, "eval", ["checkpoint=x.pt", "data.tile.size=80"], saved)
