"""Ingredients of recipes, alone and together, on BCCD's blood cells and on drawn shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from _comparison.rows import Row

PLAIN = ("roi_head=two_layer", "model.roi_head.box_head.width=1024", "trainer.ema=null")  # what experiments may add
CASCADE = "roi_head=cascade"
NARROW = "model.roi_head.box_head.width=512"
EMA = "trainer.ema=0.998"
SOFT_NMS = "model.roi_head.test_filter._target_=fpn_det.models.selection.SoftDetectionFilter"
VERTICAL_FLIP = "data.train_transforms.vertical_flip={_target_: albumentations.VerticalFlip, p: 0.5}"
MULTI_SCALE = "data.train_transforms.resize={sides: [192, 216, 240, 264, 288], max_side: 384, per_step: true}"
ONE_SCALE = "data.train_transforms.resize={sides: [240], max_side: 320}"
EVERYTHING = (
    "cascade with heads of 512, moving average, vertical flip, multi-scale",
    *(CASCADE, NARROW, EMA, VERTICAL_FLIP, MULTI_SCALE),
)
CONVOLUTIONS = "_target_: fpn_det.models.box_heads.ConvHead, _partial_: true, num_convs: 4, norm: group"


@dataclass(frozen=True)
class Table:
    """Variants of a recipe.

    Attributes:
        name: of its files, and the start of the names of its rows.
        title, text: on the page.
        metrics: columns, as the evaluation names them.
        rows: the base comes first.
    """

    name: str
    title: str
    text: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def base(self) -> Row:
        """The row that the others are compared with."""
        return self.rows[0]

    def words(self, row: Row) -> str:
        """The settings of a row that its base does not have."""
        return " ".join(word for word in row.settings if row.weights_of or word not in self.base.settings)


def tables(bccd: Path, shapes: Path, seeds: int) -> tuple[Table, ...]:
    """All rows, whose data are in the folders `bccd` and `shapes`."""
    # measured on the test list, without a choice among checkpoints
    cells = (f"data.root={bccd}", f"data.val.annotations={bccd / 'ImageSets/Main/test.txt'}", "trainer.eval_every=null")

    def rows(table: str, base: tuple[str, ...], *variants: tuple[str, ...]) -> tuple[Row, ...]:
        """The base, and variants of it: the end of the row's name, its title, and the words that it adds."""
        return (
            Row(f"{table}_base", "base", base, seeds),
            *(
                # the weights of the base do: suppression changes nothing in training
                Row(f"{table}_{name}", title, tuple(words), seeds, weights_of=f"{table}_base")
                if SOFT_NMS in words
                else Row(f"{table}_{name}", title, (*base, *words), seeds)
                for name, title, *words in variants
            ),
        )

    pretrained = Table(
        "pretrained",
        "BCCD, from ImageNet weights of EfficientNet-Lite0, 8 epochs",
        "`experiment=finetune_small`, 408 steps of 4 images at 320 x 240. The base has none of the ingredients. torchvision's Faster R-CNN "
        "on the same weights, trained as long, reaches AP 54.5 and AP50 90.8.",
        ("AP", "AP50", "AP75"),
        rows(
            "pretrained",
            (
                "experiment=finetune_small",
                "data=voc",
                "data.on_error=fix",
                ONE_SCALE,
                "data.eval_transforms.resize={sides: [240], max_side: 320}",
                "trainer.epochs=8",
                *cells,
                *PLAIN,
            ),
            ("together", "cascade with heads of 512, moving average", CASCADE, NARROW, EMA),
            ("everything", *EVERYTHING),
            ("ema", "moving average of the weights", EMA),
            ("cascade", "cascade", CASCADE),
            ("cascade_narrow", "cascade with heads of 512", CASCADE, NARROW),
            ("soft_nms", "Soft-NMS", SOFT_NMS),
            ("giou", "GIoU", "box_loss@model.roi_head.box_loss=giou"),
            ("ciou", "CIoU", "box_loss@model.roi_head.box_loss=ciou"),
            ("rpn_giou", "GIoU in the RPN", "box_loss@model.rpn.box_loss=giou", "model.rpn.box_loss.weight=1"),
            ("dynamic", "Dynamic R-CNN", "roi_head=dynamic"),
            ("label_smoothing", "label smoothing", "model.roi_head.cls_loss.label_smoothing=0.1"),
            ("layer_decay", "learning rates by depth", "optimizer.layer_decay=0.8"),
            ("focal", "focal loss in the RPN", "objectness_loss@model.rpn.cls_loss=focal"),
            ("vertical_flip", "vertical flip", VERTICAL_FLIP),
            ("multi_scale", "multi-scale", MULTI_SCALE),
            ("pafpn", "PAFPN", "neck=pafpn"),
            ("conv_head", "4conv1fc head with group norm", f"model.roi_head.box_head={{{CONVOLUTIONS}}}"),
        ),
    )
    scratch = Table(
        "scratch",
        "BCCD, ResNet-18 from scratch, 24 epochs",
        "`experiment=bccd`, 1,224 steps of 4 images at 320 x 240. The base has none of the ingredients. torchvision's Faster R-CNN trained "
        "the same way reaches AP 54.0 and AP50 87.3.",
        ("AP", "AP50", "AP75"),
        rows(
            "scratch",
            ("experiment=bccd", *cells, *PLAIN, "data.train_transforms.vertical_flip=null", ONE_SCALE),
            ("together", *EVERYTHING),
        ),
    )
    drawn = Table(
        "shapes",
        "Drawn shapes, ResNet-18 from scratch, 800 steps",
        "The detector of row (c) of [the paper's Table 3](paper.md), on the same images of 128 x 128 px.",
        ("AP", "AP50", "APs", "APm", "APl"),
        rows(
            "shapes",
            ("experiment=paper/table3_c", "reduced=detector", f"data.root={shapes}"),
            ("together", "cascade, moving average", CASCADE, EMA),
            ("cascade", "cascade", CASCADE),
            ("ema", "moving average of the weights", EMA),
            ("ciou", "CIoU", "model.roi_head.box_loss={_target_: fpn_det.models.losses.CIoU, weight: 10}"),
            ("deformable", "deformable convolution in C3 to C5", "model.backbone.deformable=[3,4,5]"),
        ),
    )
    return pretrained, scratch, drawn
