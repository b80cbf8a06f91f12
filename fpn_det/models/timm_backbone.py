"""Backbones of timm (PyTorch Image Models), by its `features_only` interface."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.models.backbone import Backbone
from fpn_det.models.layers import SyncBatchNorm2d
from fpn_det.schema import Count, Decay
from fpn_det.weight_files import TIMM_EXTRA, check_source, pixel_statistics, read_state

STRIDES = (4, 32)  # of the finest and the coarsest map
# Arguments by which timm's models of a fixed input size admit others.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
MOST = 0.5  # share of the parameters


class TimmBackbone(Backbone):
    """Maps of stride 4 to 32 of a model of timm, as [B, C, H, W].

    Channels and strides come from the model's `feature_info`, mean and deviation of the pixels from timm's configuration of
    the weights that are set, or of `name` if they are not timm's; all of timm's weights take RGB. Canvases must divide by
    the last stride, or by the side of timm's own input where a model asks for that (those that divide a map into a fixed
    number of windows).

    Random draws of stochastic depth are those of torch's generator, which training seeds from (seed, step, rank).

    Args:
        name: of the model in timm, such as `convnext_tiny.fb_in22k_ft_in1k`.
        weights: `timm` (what timm publishes under `name`), `timm/<name>`, `pip/<package>` (the file of weights in an
            installed package), the path of a state dict, or None for random ones.
        weights_by: tensors of a file are taken by `name`, or by `order` from a file of the same model in another project's
            names; shape and last part of the name must then agree for every single tensor.
        norm: of the model's batch norms: frozen, fixed_statistics, batch or sync; None = frozen with pretrained weights,
            batch without. Norms of other kinds are trained.
        frozen_stages: the first of stem, C2, C3, C4, C5 that are not trained; None = 2 with pretrained weights, 0 without
            and where C2 depends on most of the model, or the images have other channels.
        drop_path: rate of stochastic depth at the last block, of models that have it.
        in_channels: of the images. timm adapts pretrained weights of three, as `weights.widen_input` does.

    Raises:
        ValueError: timm is missing, has no such model, or its maps do not form a pyramid.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        weights_by: Literal["name", "order"] = "name",
        norm: Literal["frozen", "fixed_statistics", "batch", "sync"] | None = None,
        frozen_stages: int | None = None,
        drop_path: Decay = 0.0,
        in_channels: Count = 3,
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"[\w.]+", name):  # timm would fetch from other places
            raise ValueError(f"backbone.name: expected a name that timm.list_models() gives, got '{name}'.")
        if frozen_stages is not None and not 0 <= frozen_stages <= 5:
            raise ValueError(f"backbone.frozen_stages: expected 0 (none) to 5 (all), got {frozen_stages}.")
        self.name = name
        self.weights = f"timm/{name}" if weights == "timm" else weights
        self.weights_by = weights_by
        self.norm = norm or ("frozen" if weights else "batch")
        self.frozen_stages = frozen_stages
        self.drop_path = drop_path
        self.in_channels = in_channels
        with torch.device("meta"):
            model = self._create()
        if drop_path and not any(type(part).__name__ == "DropPath" for part in model.modules()):
            raise ValueError(self._refusal_of_drop_path())  # some models ignore the argument
        self.places = _places(model.feature_info, name)
        self._build()

    def _build(self) -> None:
        self.model: Any = self._create(out_indices=self.places)
        _fix_padding(self.model)
        config = self.model.pretrained_cfg  # of `name`; the weights may be others
        self.pixel_mean, self.pixel_std = pixel_statistics(self.weights, f"TimmBackbone({self.name})") or (
            tuple(255 * value for value in config["mean"]),
            tuple(255 * value for value in config["std"]),
        )
        self.channels = tuple(self.model.feature_info.channels())
        self.strides = tuple(self.model.feature_info.reduction())
        self.is_nhwc = str(getattr(self.model, "output_fmt", "")).endswith("NHWC")
        if self.norm == "sync":
            _synchronize(self.model)
        self._divisor, maps = self._probe(config["input_size"][-1])
        self.stages = self._divide(maps)
        self._leave_out_unused_blocks()
        if self.frozen_stages is None:
            finest, total = (
                sum(parameter.numel() for stage in stages for parameter in stage)
                for stages in (self.stages[:2], self.stages)
            )
            self.frozen_stages = 2 if self.weights and self.in_channels == 3 and finest < MOST * total else 0
        self._fix_parameters()

    @property
    def divisor(self) -> int:
        return self._divisor

    def _create(self, **arguments: Any) -> Any:
        """The model with random weights, or with those that `pretrained_cfg_overlay` gives.

        Raises:
            ValueError: timm is missing, or has no such model.
        """
        try:
            import timm
        except ImportError:
            raise ValueError(f"backbone.name: {TIMM_EXTRA}") from None
        # some models have stochastic depth by default, others do not have the argument
        rates: tuple[dict[str, Any], ...] = ({"drop_path_rate": self.drop_path}, *([] if self.drop_path else [{}]))
        refusals = []
        for extra in ({**size, **rate} for rate in rates for size in ANY_SIZE):
            try:
                return timm.create_model(self.name, features_only=True, in_chans=self.in_channels, **arguments, **extra)
            except TypeError as error:  # an argument that this model does not have
                refusals.append(error)
            except (RuntimeError, AssertionError, AttributeError, ValueError) as error:
                architecture = self.name.split(".")[0]
                near = timm.list_models(f"{architecture[:8]}*")[:5]
                raise ValueError(
                    f"backbone.name: expected a model of timm with feature maps, got '{self.name}' ({error})."
                    + (f" Similar ones: {', '.join(near)}." if near else "")
                ) from None
        if self.drop_path and "drop_path_rate" in str(refusals[-1]):
            raise ValueError(self._refusal_of_drop_path())
        raise ValueError(f"backbone.name: timm cannot build {self.name}: {refusals[-1]}.")

    def _refusal_of_drop_path(self) -> str:
        return f"backbone.drop_path: expected 0 for {self.name}, which has none, got {self.drop_path}."

    def _probe(self, input_side: int) -> tuple[int, list[Tensor]]:
        """Find the divisor of canvases, and the maps of a canvas of zeros, whose graph shows what they depend on.

        Raises:
            ValueError: the model takes no canvas but its own, or its maps are not as timm declares them.
        """
        was_training = self.model.training
        self.model.eval()
        refusal: Exception | None = None
        for divisor in dict.fromkeys([self.strides[-1], input_side]):
            try:
                with torch.enable_grad():
                    maps = self.forward(torch.zeros(1, self.in_channels, divisor, 2 * divisor))
            except (RuntimeError, AssertionError, ValueError) as error:
                refusal = error
                continue
            expected = [
                (1, width, divisor // stride, 2 * divisor // stride)
                for width, stride in zip(self.channels, self.strides, strict=True)
            ]
            if [tuple(found.shape) for found in maps] == expected:
                self.model.train(was_training)
                return divisor, maps
        reason = f" ({' '.join(str(refusal).split())[:150]})" if refusal else ""
        raise ValueError(
            f"backbone.name: expected a model that takes images of any size, got {self.name}, which does not{reason}."
        )

    def _divide(self, maps: Sequence[Tensor]) -> list[list[nn.Parameter]]:
        """The parameters of stem, C2, C3, ...: of each map those that no finer map depends on.

        The stem is what C2 depends on outside of the module that timm names for it. What no map depends on, such as a last
        convolution for classification, is in no stage.
        """
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found: list[list[nn.Parameter]] = []
        known: set[int] = set()
        for features in maps:
            stage = {id(parameter): parameter for parameter in _reached(features) if id(parameter) in names}
            found.append([parameter for key, parameter in stage.items() if key not in known])
            known |= stage.keys()
        module = self.model.feature_info.module_name()[0]
        prefixes = tuple(f"{start}{name}." for name in (module, module.replace(".", "_")) for start in ("", "model."))
        stem = [parameter for parameter in found[0] if not names[id(parameter)].startswith(prefixes)]
        kept = {id(parameter) for parameter in stem}
        return [stem, [parameter for parameter in found[0] if id(parameter) not in kept], *found[1:]]

    def _leave_out_unused_blocks(self) -> None:
        """Remove the last blocks if no map depends on them: timm's EfficientNets run all of theirs."""
        used = {id(parameter) for stage in self.stages for parameter in stage}
        blocks = getattr(self.model, "blocks", None)
        while isinstance(blocks, nn.Sequential) and not any(id(item) in used for item in blocks[-1].parameters()):
            del blocks[-1]

    def _fix_parameters(self) -> None:
        """Stop the training of frozen stages, of frozen norms, and of what no map depends on."""
        assert self.frozen_stages is not None
        trained = {id(parameter) for stage in self.stages[self.frozen_stages :] for parameter in stage}
        if self.norm == "frozen":
            trained -= {id(parameter) for norm in self._batch_norms() for parameter in norm.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _batch_norms(self) -> Iterator[nn.Module]:
        return (module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d))

    def parameters_by_stage(self) -> list[list[nn.Parameter]]:
        """The parameters of stem, C2, C3, ..."""
        return self.stages

    def truncate(self, num_maps: int) -> None:
        """Make the model again without what follows the first `num_maps` maps."""
        if num_maps != len(self.places):
            self.places = self.places[:num_maps]
            self._build()

    def train(self, mode: bool = True) -> TimmBackbone:
        """Fixed norms keep their statistics, and frozen stages are as in evaluation."""
        super().train(mode)
        if not mode or not hasattr(self, "stages"):
            return self
        for module in self.model.modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        if self.norm in ("frozen", "fixed_statistics"):
            for norm in self._batch_norms():
                norm.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalized images [B, C, H, W] to maps [B, C_k, H / stride_k, W / stride_k], fine to coarse."""
        maps = self.model(x)
        return [found.permute(0, 3, 1, 2) for found in maps] if self.is_nhwc else list(maps)

    def check_pretrained(self) -> None:
        """Refuse what `load_pretrained` would refuse, as far as that is known without the network or reading a file.

        Raises:
            ValueError: no such weights, or random weights that would stay as they are.
        """
        if self.weights is not None:
            check_source(self.weights, f"TimmBackbone({self.name})")
        elif self.frozen_stages or (self.norm == "frozen" and any(self._batch_norms())):
            raise ValueError(
                f"model.backbone: expected trained weights under norm={self.norm} and frozen_stages={self.frozen_stages}, "
                "got random ones. Set model.backbone.weights or init_from, or norm=batch and frozen_stages=0."
            )

    def load_pretrained(self) -> None:
        """Load the weights that `weights` names; None leaves the random ones.

        Raises:
            ValueError: they cannot be read or fetched, or do not fit.
        """
        self.check_pretrained()
        if self.weights is None:
            return
        where = f"TimmBackbone({self.name})"
        state = read_state(self.weights, where)
        if self.weights_by == "order":
            state = self._renamed_by_order(state, where)
        # timm translates names and shapes of published weights; tensors of NaN show which of the model's it fills
        marks = self._converted({name: torch.full_like(value, torch.nan) for name, value in _floats(state).items()})
        own = self.model.state_dict()
        missing = [name for name, value in _floats(own).items() if not bool(marks[name].isnan().any())]
        if missing:
            raise ValueError(
                f"{where}: expected weights of this model in {self.weights}, got none for {len(missing)} of its "
                f"{len(own)} tensors ({', '.join(missing[:3])}). For the same model in other names set "
                "model.backbone.weights_by=order."
            )
        self.model.load_state_dict(self._converted(state))

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dict of the model after timm has loaded `state` into it."""
        logger = logging.getLogger("timm")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns about the classifier
        try:
            model = self._create(
                out_indices=self.places, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}
            )
        except Exception as error:  # of any kind: timm's translations of names take what they need by name
            cause = (isinstance(error, ValueError) and error.__context__) or error  # of `_create`'s word on the model
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:150]
            raise ValueError(
                f"TimmBackbone({self.name}): expected weights of this model in {self.weights}, got others ({reason})."
            ) from None
        finally:
            logger.setLevel(level)
        state = model.state_dict()
        return {name: state[name] for name in self.model.state_dict()}

    def _renamed_by_order(self, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Tensors under the names that the complete model has in their places.

        Raises:
            ValueError: number, shape or last part of the name of a tensor differ.
        """
        import timm

        with torch.device("meta"):
            expected = timm.create_model(self.name).state_dict()
        if len(state) != len(expected):
            raise ValueError(
                f"{where}: expected the {len(expected)} tensors of timm's {self.name} in {self.weights}, got {len(state)}."
            )
        for (name, value), (own, place) in zip(state.items(), expected.items(), strict=True):
            if value.shape != place.shape or name.rpartition(".")[2] != own.rpartition(".")[2]:
                raise ValueError(
                    f"{where}: expected {own} {list(place.shape)} in this place of {self.weights}, got {name} "
                    f"{list(value.shape)}. It is another model."
                )
        return dict(zip(expected, state.values(), strict=True))


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding of maps that divide by its stride, where the padding is constant.

    timm's `Conv2dSame` computes it from the size of each map. Under torch.export with any height and width, the text of the
    symbolic size then triples at every stride, and the trace does not end.
    """

    def forward(self, x: Tensor) -> Tensor:
        total = [
            max(dilation * (kernel - 1) + 1 - stride, 0)
            for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        (top, bottom), (left, right) = ((side // 2, side - side // 2) for side in total)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _fix_padding(model: nn.Module) -> None:
    """Replace timm's convolutions with SAME padding, which canvases divide, by those with constant padding."""
    for parent in list(model.modules()):
        for name, part in parent.named_children():
            if isinstance(part, nn.Conv2d) and type(part).__name__ == "Conv2dSame":
                fixed = SameConv2d(
                    part.in_channels,
                    part.out_channels,
                    part.kernel_size,  # type: ignore[arg-type]
                    part.stride,  # type: ignore[arg-type]
                    dilation=part.dilation,  # type: ignore[arg-type]
                    groups=part.groups,
                    bias=part.bias is not None,
                    device="meta",
                )
                fixed.weight, fixed.bias = part.weight, part.bias
                setattr(parent, name, fixed)


def _places(info: Any, name: str) -> list[int]:
    """Indices of the maps of stride 4 to 32; of several with one stride the last.

    Raises:
        ValueError: there are fewer than two.
    """
    by_stride = dict(zip(info.reduction(), info.out_indices, strict=True))
    strides = [stride for stride in sorted(by_stride) if STRIDES[0] <= stride <= STRIDES[1]]
    if len(strides) < 2:
        raise ValueError(
            f"backbone.name: expected a model with maps of growing stride, got {name} with strides "
            f"{', '.join(map(str, info.reduction()))}."
        )
    return [by_stride[stride] for stride in strides]


def _reached(output: Tensor) -> Iterator[nn.Parameter]:
    """The leaves of the graph that computed a tensor."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [parent for parent, _ in node.next_functions]


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


class _SyncBatchNormAct2d(SyncBatchNorm2d):
    """Our synchronized norm in place of timm's norm with an activation."""

    drop: Any
    act: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _synchronize(model: nn.Module) -> None:
    """Replace the batch norms of a model by those over all ranks."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.BatchNorm2d):
                continue
            has_activation = hasattr(child, "act") and hasattr(child, "drop")
            kind = _SyncBatchNormAct2d if has_activation else SyncBatchNorm2d
            norm = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            norm.load_state_dict(child.state_dict())
            if has_activation:
                norm.drop, norm.act = child.drop, child.act
            setattr(parent, name, norm)
