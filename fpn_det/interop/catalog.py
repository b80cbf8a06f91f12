"""Published detectors by name: where their files are, and what is known about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights, FasterRCNN_ResNet50_FPN_Weights

from fpn_det.interop.naming import PROJECTS
from fpn_det.schema import did_you_mean
from fpn_det.weight_files import HASH_IN_NAME, cache_path, fetch

DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection"
MMDET = "https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn"


@dataclass(frozen=True)
class Published:
    """A file of weights that another project publishes.

    Attributes:
        url: of the file.
        ap: on COCO val2017, in percent, as its project states it.
        megabytes: size of the file, rounded.
        licence: of the weights or, if they have none of their own, of the project.
        sha256: of the file; None = the digits in its name, if it has any.
    """

    url: str
    ap: float
    megabytes: int
    licence: str
    sha256: str | None = None

    @property
    def hash(self) -> str | None:
        """SHA-256 of the file, or its first digits; None if it is not known."""
        in_name = HASH_IN_NAME.search(self.url)
        return self.sha256 or (in_name[1] if in_name else None)

    @property
    def path(self) -> Path:
        """File in the cache, which need not exist."""
        return cache_path(self.url)


def _of_torchvision(entry: FasterRCNN_ResNet50_FPN_Weights | FasterRCNN_ResNet50_FPN_V2_Weights) -> Published:
    measured = entry.meta["_metrics"]["COCO-val2017"]["box_map"]
    return Published(entry.url, measured, round(entry.meta["_file_size"]), "BSD-3-Clause")


def _of_detectron2(path: str, ap: float, megabytes: int, sha256: str | None = None) -> Published:
    return Published(f"{DETECTRON2}/{path}", ap, megabytes, "CC-BY-SA-3.0", sha256)


PUBLISHED: Mapping[str, Published] = {
    "torchvision/fasterrcnn_resnet50_fpn": _of_torchvision(FasterRCNN_ResNet50_FPN_Weights.COCO_V1),
    "torchvision/fasterrcnn_resnet50_fpn_v2": _of_torchvision(FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1),
    "detectron2/faster_rcnn_R_50_FPN_1x": _of_detectron2(
        "faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl", 37.9, 167
    ),
    "detectron2/faster_rcnn_R_50_FPN_3x": _of_detectron2(
        "faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
        40.2,
        167,
        "3c25caca37baabbff3e22cc9eb0923db165a0c18b867871a3bf3570bac9b7ef0",
    ),
    "detectron2/faster_rcnn_R_101_FPN_3x": _of_detectron2(
        "faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl", 42.0, 243
    ),
    "mmdet/faster-rcnn_r50_fpn_1x_coco": Published(
        f"{MMDET}/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth",
        37.4,
        167,
        "Apache-2.0",
    ),
    "mmdet/faster-rcnn_r50_fpn_2x_coco": Published(
        f"{MMDET}/faster_rcnn_r50_fpn_2x_coco/faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",
        38.4,
        167,
        "Apache-2.0",
    ),
}


def check_detector(source: str | Path, where: str) -> None:
    """Refuse a source that `locate` would refuse, as far as that is known without the network.

    Raises:
        ValueError: it is neither a published name nor a file.
    """
    name = str(source)
    if name in PUBLISHED or Path(source).is_file():
        return
    if name.split("/")[0] in PROJECTS and not Path(source).suffix:
        raise ValueError(
            f"{where}: expected the name of a published detector, got {name}.{did_you_mean(name, PUBLISHED)} "
            "fpn-det weights lists them."
        )
    if Path(source).is_dir():
        raise ValueError(
            f"{where}: expected a file of weights, got the folder {name}. The best of a run is {name.rstrip('/')}/checkpoints/best.pt."
        )
    raise ValueError(f"{where}: expected a file of weights, got {name}, which does not exist.")


def locate(source: str | Path, where: str) -> Path:
    """The file of a source: fetched into the cache once if it is a published name.

    Args:
        source: a name in `PUBLISHED`, or a path.
        where: prefix of messages.

    Raises:
        ValueError: there is no such file or name, it cannot be fetched, or its hash is wrong.
    """
    check_detector(source, where)
    published = PUBLISHED.get(str(source))
    return Path(source) if published is None else fetch(published.url, where, sha256=published.hash)
