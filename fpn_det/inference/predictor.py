"""Detection on images without annotations, with the preprocessing of evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fpn_det.config import PRECISIONS, DetectorConfig
from fpn_det.data.bad_images import OnBadImage
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.flip_resize import Size
from fpn_det.data.loaders import EvalLoader
from fpn_det.data.tiles import Tiles, Tiling
from fpn_det.data.transforms import Pipeline
from fpn_det.data.workers import Workers
from fpn_det.image_io import MAX_PIXELS, BadImage, image_size
from fpn_det.inference.images import ImageInput, find_images, is_video, read_display, read_pixels
from fpn_det.inference.prediction import Prediction
from fpn_det.inference.selection import Selection, Thresholds
from fpn_det.inference.video import read_batches, read_frame
from fpn_det.models.tiles import Detects, check_tiles, detect_all
from fpn_det.models.views import Views
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations, Batch, ScoreThresholds


@dataclass(frozen=True)
class Preprocessing:
    """The way from images to batches, as in the evaluation of the model."""

    transform: Pipeline  # from the original frame to the input frame
    collator: Collator
    batch_size: int = 1  # images of similar aspect ratio are batched together
    workers: Workers = field(default_factory=Workers)
    reduced_decoding: bool = False  # decode JPEG files at 1/2, 1/4 or 1/8 of their size if that is large enough
    max_pixels: int = MAX_PIXELS  # largest width * height of an image file
    tiling: Tiling | None = None  # also detect on the tiles of each image

    def loader(
        self,
        images: Annotations,
        pixels: Mapping[Path, np.ndarray],
        device: torch.device,
        on_bad_image: OnBadImage | None,
    ) -> EvalLoader:
        """Build the loader of images.

        Args:
            images: without objects.
            pixels: of those that are not files, by the path that stands for them.
            device: that batches are copied to.
            on_bad_image: called for each image that is left out; None makes bad images an error.
        """

        def read(path: Path, reduction: int) -> np.ndarray:
            if path in pixels:
                return pixels[path]
            return read_pixels(path, reduction, self.max_pixels, self.transform.pixel_format)

        reduced = self.reduced_decoding and not pixels
        workers = Workers() if pixels else self.workers  # their start takes longer than the resizing of a few images
        tiles = None if self.tiling is None else Tiles.of(images.sizes, self.tiling)
        dataset = DetectionDataset(images, self.transform, 0, reduced_decoding=reduced, read=read, tiles=tiles)
        return EvalLoader(dataset, self.batch_size, Ranks(), self.collator, workers, device, on_bad_image)


class Predictor:
    """A trained detector with the preprocessing of its evaluation.

    Args:
        model: on `device`, in evaluation mode.
        class_names: of its labels.
        preprocessing: makes its batches.
        device: of the model.
        dtype: of autocast; None disables it.
        tta: test-time augmentation; None uses the image as it is.
        category_ids: of the labels in COCO results; empty = label + 1.
        score_thresholds: of a checkpoint. They apply where no score is given.
    """

    def __init__(
        self,
        model: Detects,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype | None = None,
        tta: Views | None = None,
        category_ids: Sequence[int] = (),
        score_thresholds: ScoreThresholds | None = None,
    ) -> None:
        self.model = model
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.device = device
        self.dtype = dtype
        self.tta = tta
        self.category_ids = tuple(category_ids)
        self.score_thresholds = score_thresholds

    def __repr__(self) -> str:
        shown = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
        return f"Predictor({len(self.class_names)} classes: {shown}; on {self.device})"

    def predict(
        self,
        source: ImageInput | Sequence[ImageInput],
        *,
        score: float | None = None,
        classes: Sequence[str] | None = None,
        max_detections: int | None = None,
        size: int | None = None,
        tile: int | None = None,
        overlap: float | None = None,
        download: bool = False,
    ) -> list[Prediction]:
        """Detect objects in images.

        Args:
            source: a path, folder, pattern, list of paths, URL, PIL image or array, or a list of these; see `find_images`.
            score: detections below are left out. None takes the thresholds of the checkpoint, if it has any.
            classes: names of the classes to keep; None keeps all.
            max_detections: per image, the best ones; at most as many as the model gives.
            size: shorter side to which images are resized, px; None resizes as in the evaluation.
            tile: side of the tiles that are detected on too, px of the image; 0 = none; None = as in the evaluation.
            overlap: of neighbouring tiles, as a fraction of their side; None = as in the evaluation.
            download: fetch URLs.

        Returns:
            A prediction for each image, in their order.

        Raises:
            ValueError: an image is of another type or cannot be read, or an option is impossible.
        """
        images = find_images(source, download, self.preprocessing.transform.pixel_format)
        for image in images:
            if isinstance(image, Path) and is_video(image):
                raise ValueError(
                    f"predict: expected images, got the video {image}. Use predict_video, which yields a prediction for each "
                    f"frame, or fpn-det predict source={image}."
                )
        selection = self.selection(score, classes, max_detections)
        preprocessing = self.preprocessing_with(size, tile, overlap)
        found = {one.image_id: one for one in self.stream(images, selection, preprocessing)}
        return [found[number] for number in sorted(found)]

    def predict_video(
        self,
        source: str | Path,
        *,
        score: float | None = None,
        classes: Sequence[str] | None = None,
        max_detections: int | None = None,
        size: int | None = None,
        tile: int | None = None,
        overlap: float | None = None,
    ) -> Iterator[Prediction]:
        """Detect objects in a video, and yield a prediction for each frame in their order. Memory does not grow with its length.

        Args:
            source: the file.
            score: see `predict`, as the next ones.

        Raises:
            BadImage: the file cannot be read, or is damaged or truncated; this is raised after the last good frame.
            ValueError: PyAV is not installed, or an option is impossible.
        """
        selection = self.selection(score, classes, max_detections)
        preprocessing = self.preprocessing_with(size, tile, overlap)
        frames = self.stream_video(Path(source), selection, preprocessing)
        return (prediction for _, prediction in frames)

    def selection(
        self, score: float | None = None, classes: Sequence[str] | None = None, max_detections: int | None = None
    ) -> Selection:
        """Build the selection of detections from the options of `predict`."""
        return Selection.of(self.class_names, self.thresholds(score), classes, max_detections)

    def thresholds(self, score: float | None = None) -> Thresholds:
        """Return the score thresholds that apply if the option `score` is given."""
        return Thresholds.choose(self.class_names, score, self.score_thresholds)

    def preprocessing_with(
        self, size: int | None = None, tile: int | None = None, overlap: float | None = None
    ) -> Preprocessing:
        """Build the preprocessing from the options of `predict`.

        Raises:
            ValueError: an option is impossible.
        """
        result = self.preprocessing
        if size is not None:
            if size < 1:
                raise ValueError(f"size: expected a side of at least 1 px, got {size}.")
            result = replace(result, transform=result.transform.resized_to(size))
        tiling = result.tiling
        if tile is not None:
            if tile < 0:
                raise ValueError(f"tile: expected a side in px, or 0 for whole images only, got {tile}.")
            tiling = Tiling(tile, tiling.overlap if tiling else Tiling.overlap) if tile else None
        if overlap is not None:
            if not 0 <= overlap < 1 or tiling is None:
                found = overlap if tiling else f"{overlap} without tiles"
                raise ValueError(f"overlap: expected a fraction from 0 to below 1 of a tile, got {found}.")
            tiling = replace(tiling, overlap=overlap)
        if tiling is not None:
            check_tiles(self.model)
        return replace(result, tiling=tiling)

    def stream(
        self,
        images: Sequence[ImageInput],
        selection: Selection,
        preprocessing: Preprocessing,
        image_ids: Sequence[int] | None = None,
        on_bad_image: OnBadImage | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> Iterator[Prediction]:
        """Yield the predictions batch by batch, in the order of aspect ratios.

        Args:
            images: files, PIL images or arrays.
            selection: of detections.
            preprocessing: see `preprocessing_with`.
            image_ids: of the images; None numbers them from 1 on.
            on_bad_image: called for each image that cannot be read, which has no prediction; None makes it an error.
            sizes: (h, w) of files, by `size_of`; None reads them from the headers of the files.
        """
        annotations, pixels = self._describe(images, image_ids, sizes)
        batches = preprocessing.loader(annotations, pixels, self.device, on_bad_image)
        for batch, detections in detect_all(self.model, batches, self.dtype, self.tta):
            detections = detections.to_original(batch).cpu()
            for index, found in zip(batch.indices.tolist(), detections.images(), strict=True):
                image, path = images[index], annotations.path(index)
                yield Prediction(
                    *selection(*found),
                    class_names=self.class_names,
                    size=tuple(annotations.sizes[index].tolist()),
                    path=None if path in pixels else path,
                    image_id=int(annotations.image_ids[index]),
                    category_ids=self.category_ids,
                    _read=partial(read_display, image, preprocessing.max_pixels),
                )

    def stream_video(
        self,
        path: Path,
        selection: Selection,
        preprocessing: Preprocessing,
        on_bad_video: OnBadImage | None = None,
    ) -> Iterator[tuple[np.ndarray, Prediction]]:
        """Yield the frames of a video, u8 [h, w, 3] RGB, with their predictions.

        Args:
            path: of the file.
            selection: of detections.
            preprocessing: see `preprocessing_with`.
            on_bad_video: called after the last good frame if the file cannot be read to its end; None makes it an error.
        """
        limit, number = preprocessing.max_pixels, 0
        try:
            for frames in read_batches(path, preprocessing.batch_size, limit):
                found = sorted(self.stream(frames, selection, preprocessing), key=lambda one: one.image_id)
                for pixels, prediction in zip(frames, found, strict=True):
                    read = partial(read_frame, path, number, limit)
                    yield pixels, replace(prediction, path=path, frame=number, image_id=number + 1, _read=read)
                    number += 1
        except BadImage as error:
            if on_bad_video is None:
                raise
            on_bad_video(error)

    def batch_of(self, images: Sequence[ImageInput]) -> Batch:
        """Preprocess images to one batch without objects."""
        annotations, pixels = self._describe(images)
        whole = replace(self.preprocessing, batch_size=len(images), workers=Workers(), tiling=None)
        (batch,) = whole.loader(annotations, pixels, self.device, None)
        return batch

    def _describe(
        self,
        images: Sequence[ImageInput],
        image_ids: Sequence[int] | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> tuple[Annotations, dict[Path, np.ndarray]]:
        """Return the images as a data set without objects, and the pixels of those that are not files by their paths in it."""
        paths, found_sizes, pixels = [], [], {}
        for index, image in enumerate(images):
            path = Path(image) if isinstance(image, str | Path) else Path(f"<image {index + 1}>")
            if isinstance(image, str | Path):
                size = size_of(path) if sizes is None else sizes[index]
            else:
                pixels[path] = read_pixels(image, pixel_format=self.preprocessing.transform.pixel_format)
                size = pixels[path].shape[:2]
            paths.append(str(path))
            found_sizes.append(size)
        ids = self.category_ids or range(1, len(self.class_names) + 1)
        return Annotations.without_objects(paths, found_sizes, self.class_names, ids, image_ids), pixels


def size_of(file: Path) -> Size:
    """Read the (h, w) of an image from its header; 1 x 1 if that fails, as reading the pixels will tell why."""
    return image_size(file) or (1, 1)


def build_predictor(
    config: DetectorConfig,
    model: Any,
    class_names: Sequence[str],
    device: torch.device,
    tta: Views | None = None,
    category_ids: Sequence[int] = (),
    score_thresholds: ScoreThresholds | None = None,
    num_workers: int = 0,
) -> Predictor:
    """Combine a model with the preprocessing of its evaluation. Proposals of an RPN alone are of one class, `object`.

    Args:
        config: its settings.
        model: a `Detector`, which is moved to `device`, or another model with `detect` and the attribute `stride`.
        class_names: see `Predictor`, as the next ones.
        num_workers: processes that read images; 0 is best for a few images.
    """
    data = config.data
    if config.model.get("roi_head", "") is None:
        class_names, category_ids = ("object",), (1,)
    config.set_precision()
    if isinstance(model, nn.Module):
        model.to(device).eval()
    preprocessing = Preprocessing(
        data.transforms(train=False),
        data.collator(model.stride),
        data.eval_batch_size,
        Workers(num_workers, data.start_method),
        reduced_decoding=data.reduced_decoding == "always",
        max_pixels=data.max_image_pixels,
        tiling=config.tiling,
    )
    dtype = PRECISIONS[config.precision]
    return Predictor(model, class_names, preprocessing, device, dtype, tta, category_ids, score_thresholds)
