"""Small stand-ins that honor the interfaces of model and loader, so that the engine can be tested in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from fpn_det.data.config import TrainData, TrainTileConfig
from fpn_det.image_io import RGB, PixelFormat
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations, Batch, Detections, Losses, Targets
from fpn_det.training.config import TrainConfig
from fpn_det.training.optimization import Optimization
from fpn_det.training.optimizers import SGD, Recipe
from fpn_det.training.schedule import MultiStep
from fpn_det.training.trainer import Trainer

SIDE = 8


class TinyDetector(nn.Module):
    """Predicts one box per image from the picture; draws random numbers as a user's layer might."""

    def __init__(self, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 5)
        self.assigner, self.max_detections, self.stride = LevelAssigner([4, 8]), 1, 1

    def reset_classifier(self, num_classes: int) -> None:
        pass

    def check_accumulation(self, accumulate: int) -> None:
        pass

    def check_pretrained(self) -> None:
        pass

    def load_pretrained(self) -> None:
        pass

    def predict(self, batch: Batch) -> Tensor:
        features = self.norm(self.conv(batch.pixels.float() / 255)).relu().mean((2, 3))
        return self.head(self.dropout(features)).float()

    def forward(self, batch: Batch, step: int) -> Losses:
        prediction = self.predict(batch)
        jitter = 0.1 * torch.sin(batch.indices + step)
        terms = {
            "roi_class": (prediction[:, 4] - jitter).square().mean(),
            "roi_box": F.l1_loss(prediction[:, :4], batch.targets.boxes[:, 0] / SIDE),
        }
        return Losses(terms, {"rois/P2": prediction.new_tensor(float(len(batch)))})

    def detect(self, batch: Batch, views=None) -> Detections:
        prediction = self.predict(batch)
        start = prediction[:, None, :2].sigmoid() * SIDE / 2
        boxes = torch.cat([start, start + SIDE / 2], dim=2)
        one = torch.ones(len(batch), 1)
        return Detections(boxes, prediction[:, 4:].sigmoid(), one.long() - 1, one.bool())


def make_batch(indices: list[int]) -> Batch:
    """The images with these numbers; each is a function of its number."""
    pixels = [torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(i)) for i in indices]
    sizes = torch.tensor([[SIDE, SIDE]]).repeat(len(indices), 1)
    boxes = [torch.tensor([[0.0, 0.0, 2.0 + i % 5, 2.0 + i % 3]]) for i in indices]
    targets = Targets.pad(boxes, [torch.zeros(1, dtype=torch.int64)] * len(indices))
    return Batch(torch.stack(pixels).to(torch.uint8), sizes, sizes, targets, torch.tensor(indices))


class TinyLoader:
    """Every image once per epoch, in order; `touch` may change or watch what is handed out."""

    tiles = None

    def __init__(
        self,
        num_images: int = 16,
        batch_size: int = 4,
        accumulate: int = 1,
        ranks: Ranks = Ranks(),  # noqa: B008
        touch: Callable[[int, Batch], Batch] = lambda step, batch: batch,
    ) -> None:
        self.batch_size = batch_size
        self.steps_per_epoch = num_images // batch_size
        self.order = torch.arange(num_images).view(
            -1, accumulate, ranks.world_size, batch_size // ranks.world_size // accumulate
        )
        self.rank = ranks.rank
        self.touch = touch

    def rebuild(self, step: int) -> list[Batch]:
        rows = self.order[step % self.steps_per_epoch, :, self.rank].tolist()
        return [self.touch(step, make_batch(row)) for row in rows]

    def largest(self) -> Batch:
        return self.rebuild(0)[0]

    def iterate(self, first_step: int) -> Iterator[Batch]:
        step = first_step
        while True:
            yield from self.rebuild(step)
            step += 1


class Watched(list):
    """Batches to evaluate; calls `on_batch` before it hands out each of them, and at the end."""

    def __init__(self, batches: list[Batch], on_batch: Callable[[], None] | None = None) -> None:
        super().__init__(batches)
        self.on_batch = on_batch or (lambda: None)

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.on_batch()
            yield batch
        self.on_batch()


@dataclass(frozen=True)
class TinyData:
    """The part of `DataConfig` that a trainer uses."""

    make_loader: Callable[..., TinyLoader]
    val_loader: list[Batch]
    channels: int = 3
    pixel_format: PixelFormat = RGB
    train_transforms: dict = field(default_factory=dict)
    eval_transforms: dict = field(default_factory=dict)
    eval_batch_size: int = 1
    max_bad_fraction: float = 0.1
    on_error: str = "fail"
    repeat_threshold: float | None = None
    tile: TrainTileConfig = field(default_factory=TrainTileConfig)
    proposals: None = None
    findings: dict = field(default_factory=dict)

    def validate(self, stride: int) -> None:
        pass

    def read_train_and_val(self, seed: int) -> TrainData:
        return TrainData(make_annotations(16), make_annotations(4), self.findings)

    def has_annotations(self, split: str) -> bool:
        return False

    def train_loader(self, annotations, *, accumulate, ranks, **options) -> TinyLoader:
        return self.make_loader(accumulate=accumulate, ranks=ranks)

    def eval_loader(self, annotations, **options) -> list[Batch]:
        return self.val_loader


@dataclass(frozen=True, kw_only=True)
class TinyConfig(TrainConfig):
    """Settings that build the stand-ins of this file."""

    recipe: Recipe
    make_schedule: Callable
    dropout: float = 0.3

    def to_yaml(self) -> str:
        return yaml.safe_dump({"trainer": asdict(self.trainer)})

    def build_model(self, num_classes):
        torch.manual_seed(0)
        return TinyDetector(dropout=self.dropout)

    def build_recipe(self):
        return self.recipe

    def build_schedule(self):
        return self.make_schedule


class TinyTrainer(Trainer):
    """A trainer that draws no figures."""

    def log_figures(self, step, evaluation) -> None:
        pass


def make_annotations(num_images: int) -> Annotations:
    """One object of one class in each image of `make_batch`."""
    paths = [f"image_{i}.jpg".encode() for i in range(num_images)]
    batch = make_batch(list(range(num_images)))
    boxes = batch.targets.boxes[:, 0].double()
    return Annotations(
        image_ids=torch.arange(num_images) + 10,
        path_bytes=torch.frombuffer(bytearray(b"".join(paths)), dtype=torch.uint8),
        path_offsets=torch.tensor([0, *torch.tensor([len(path) for path in paths]).cumsum(0).tolist()]),
        sizes=batch.sizes,
        offsets=torch.arange(num_images + 1),
        boxes=boxes,
        labels=torch.zeros(num_images, dtype=torch.int64),
        iscrowd=torch.zeros(num_images, dtype=torch.bool),
        area=boxes[:, 2] * boxes[:, 3],
        annotation_ids=torch.arange(num_images) + 1,
        class_names=("thing",),
        category_ids=(7,),
    )


def make_optimization(
    model: nn.Module | None = None, recipe: Recipe | None = None, steps: int = 20, **options: object
) -> Optimization:
    """Four images per step, constant learning rate."""
    torch.manual_seed(0)
    model = TinyDetector() if model is None else model
    recipe = SGD(lr=0.1, base_batch_size=None) if recipe is None else recipe
    schedule = MultiStep(steps=steps, milestones=(), warmup_steps=0)
    return Optimization(model, recipe.build(model, 4), schedule, **options)  # type: ignore[arg-type]


def snapshot(optimization: Optimization) -> dict[str, Tensor]:
    """Copies of every tensor that a step may move."""
    state = optimization.state()
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in (state["ema"] or {}).items()}
    for name, slots in state["optimizer"]["state"].items():
        tensors |= {f"{name}.{slot}": tensor for slot, tensor in slots.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names whose tensors are not equal to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
