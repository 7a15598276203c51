"""Images to class scores: any torch or transformers image classifier, with what prepares its pixels.

Shape letters: in `logits_BC` C counts classes, in `pixels_BCHW` channels; pixels are floats in [0, 1].
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, DataError, ModelError, NeedsError, nearest
from temper.data.pictures import Picture
from temper.data.schemas import Labelled
from temper.systems.local import CPU, LocalSystem, tried
from temper.systems.wanted import Wanted

__all__ = [
    "RESAMPLING",
    "Examples",
    "ImageClassifier",
    "Reading",
    "check_pixels",
    "load_image_classifier",
    "pictures_of",
    "prepare",
]

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Ways to resize, in the order of Pillow's numbers."""
LARGEST_PIXEL = 16.0
"""Beyond it pixels are bytes that nobody divided by 255; noise for smoothing stays well below."""


class Examples(NamedTuple):
    """What a classifier is trained and tested on: pixels and the index of each picture's class, int64."""

    pixels_BCHW: Tensor
    class_B: Tensor


class Reading(NamedTuple):
    """Class scores and a layer's values."""

    logits_BC: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class ImageClassifier(LocalSystem):
    """Pictures to class scores. Change it with `with_`, never in place.

    Normalisation with `mean` and `std` happens inside `logits`: perturbations of pixels are in units of [0, 1].
    """

    model: Any
    classes: tuple[str, ...]
    """The name of each class, in the order of the logits."""
    shape: tuple[int, int, int]
    """Channels, height and width of its pixels."""
    mean: tuple[float, ...] = ()
    """Taken from each channel's pixels before the model; () for nothing."""
    std: tuple[float, ...] = ()
    """What each channel is then divided by; () for 1."""
    resize: tuple[int, ...] = ()
    """A picture's size before the centre crop to `shape`: () covers the shape, (edge,) is the shorter edge, (height,
    width) stretches."""
    resample: str = "bilinear"
    """One of RESAMPLING."""
    device: torch.device = CPU
    spec: str = ""
    given_fingerprint: str = ""
    kind: ClassVar[str] = "ImageClassifier"

    def identity(self) -> str:
        """Classes, the pixels' preparation, and for networks of ours what was built."""
        fields = ("classes", "shape", "mean", "std", "resize", "resample")
        kept = {name: getattr(self, name) for name in fields}
        return json.dumps(kept | {"settings": getattr(self.model, "settings", None)}, sort_keys=True)

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """The pictures as (B, channels, height, width) in [0, 1]: resized, cropped at the centre, grey or colour as due.

        A colour picture becomes grey by its luma; a grey one is repeated in three channels.
        """
        rows = [prepare(picture, self.shape, self.resize, self.resample) for picture in pictures]
        bytes_BCHW = np.stack(rows) if rows else np.zeros((0, *self.shape), np.uint8)
        return torch.from_numpy(bytes_BCHW).to(self.device).float() / 255

    def examples(self, records: Sequence[Labelled]) -> Examples:
        """Pixels and class indices of labelled images; raises DataError for a text among them or an unknown class."""
        return Examples(self.pixels(pictures_of(records)), self.class_ids(records))

    def class_ids(self, records: Sequence[Labelled]) -> Tensor:
        """Index of each record's class, (B,) int64: a whole number is an index, a text the name of a class.

        Where classes are but numbers, as of a fresh network, a name's `class_index` in an image folder counts.
        """
        index = {name: number for number, name in enumerate(self.classes)}
        is_numbered = all(name == str(number) for name, number in index.items())
        found = []
        for record in records:
            label = record.label
            place = record.extra.get("class_index", -1) if is_numbered else -1
            number = index.get(label, place) if isinstance(label, str) else label
            if not 0 <= number < len(self.classes):
                raise DataError(
                    f"{label!r} is none of the {len(self.classes)} classes of {self.spec or self.kind}",
                    where=f"row {record.id!r}",
                    cure=nearest(str(label), self.classes) or "Give the index of the class, from 0.",
                )
            found.append(number)
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Class scores, (B, C), with gradient; raises DataError for pixels of another shape, NaN, or 0 to 255."""
        out = self.model(self._normal(pixels_BCHW))
        logits_BC = out if isinstance(out, Tensor) else out["logits"]
        return logits_BC.float()

    def features(self, pixels_BCHW: Tensor, layer: str = "") -> Tensor:
        """What a module gives, with gradient; see `read`."""
        return self.read(pixels_BCHW, layer).features

    def read(self, pixels_BCHW: Tensor, layer: str = "") -> Reading:
        """Class scores and a layer's values from one pass, with gradient.

        The layer is "" for the input of the last linear layer, (B, D), "NAME" for the output of a module, "NAME.input"
        for its first input.
        """
        layer = layer or f"{self.head}.input"
        with self._caught(layer) as caught:
            logits_BC = self.logits(pixels_BCHW)
        if not caught:
            raise ModelError(
                f"The module {layer!r} does not run", where=self.spec, cure="Choose another layer."
            )
        return Reading(logits_BC, caught[-1])

    @property
    def head(self) -> str:
        """Name of the last linear layer, that of the class scores where several end the model."""
        linear = {
            name: part.out_features
            for name, part in self.model.named_modules()
            if isinstance(part, nn.Linear)
        }
        heads = [name for name, width in linear.items() if width == len(self.classes)] or list(linear)
        if not heads:
            raise ModelError(
                f"{type(self.model).__name__} has no linear layer",
                where=self.spec,
                cure="Name the layer to read.",
            )
        return heads[-1]

    @contextmanager
    def _caught(self, layer: str) -> Iterator[list[Tensor]]:
        """A list that holds what passes the layer; the hook goes, also after an error."""
        name, is_input = layer.removesuffix(".input"), layer.endswith(".input")
        modules = dict(self.model.named_modules())
        if name not in modules:
            raise ConfigError(
                f"The model has no module {name!r}", where=self.spec, cure=nearest(name, modules)
            )
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            value = args[0] if is_input else out
            caught.append(value if isinstance(value, Tensor) else value[0])

        hook = modules[name].register_forward_hook(catch)
        try:
            yield caught
        finally:
            hook.remove()

    def _normal(self, pixels_BCHW: Tensor) -> Tensor:
        """Checked pixels, normalised, in the model's dtype."""
        check_pixels(pixels_BCHW, self.shape, self.spec)
        if self.mean:
            pixels_BCHW = pixels_BCHW - _per_channel(self.mean, pixels_BCHW)
        if self.std:
            pixels_BCHW = pixels_BCHW / _per_channel(self.std, pixels_BCHW)
        return pixels_BCHW.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def try_capabilities(self) -> dict[str, bool]:
        """Scores, gradients of pixels and the last features of two pictures of shades."""
        shades = torch.linspace(0.1, 0.9, 2 * math.prod(self.shape), device=self.device)
        pixels_BCHW = shades.reshape(2, *self.shape)
        classify = tried(lambda: _gives_scores(self, pixels_BCHW))
        return {
            "classify": classify,
            "grads": tried(lambda: _gives_gradients(self, pixels_BCHW)),
            "hidden": tried(lambda: _gives_features(self, pixels_BCHW)),
            "see": classify and self.shape[0] in (1, 3),
        }

    def cure_for(self, capability: str) -> str:
        """What a user can do about a missing capability."""
        if capability in ("classify", "grads", "hidden"):
            return f"{type(self.model).__name__} failed when {capability!r} was tried; choose another classifier."
        return (
            "An image classifier gives class scores only: choose a system that does more, e.g. smollm2-135m."
        )


def pictures_of(records: Sequence[Labelled], part: str = "") -> list[Picture]:
    """Each record's image; raises DataError for one that holds a text instead."""
    found = []
    for record in records:
        if record.image is None:
            raise DataError(
                "The record holds a text and no image",
                where=f"part {part!r}, row {record.id!r}" if part else f"row {record.id!r}",
                cure="An image classifier reads images: leave the texts out.",
            )
        found.append(record.image)
    return found


def prepare(
    picture: Picture, shape: tuple[int, int, int], resize: tuple[int, ...], resample: str
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture's bytes as (channels, height, width); see the fields of ImageClassifier."""
    channels, height, width = shape
    array = picture.array()
    if channels not in (1, 3):
        raise DataError(
            f"No picture has {channels} channels",
            where="ImageClassifier.pixels",
            cure="Give pixels to logits.",
        )
    size = _size_before_crop((array.shape[0], array.shape[1]), (height, width), resize)
    becomes_grey = channels < array.shape[2]
    if becomes_grey or size != array.shape[:2] or size != (height, width):
        array = _drawn(array, becomes_grey, size, (height, width), resample)
    if array.shape[2] < channels:
        array = np.repeat(array, channels, axis=2)
    return array.transpose(2, 0, 1)


def _size_before_crop(
    size: tuple[int, int], wanted: tuple[int, int], resize: tuple[int, ...]
) -> tuple[int, int]:
    if len(resize) == 2:
        return resize[0], resize[1]
    short, long = sorted(size)
    if len(resize) == 1:
        other = int(resize[0] * long / short)
        return (resize[0], other) if size[0] <= size[1] else (other, resize[0])
    scale = max(wanted[0] / size[0], wanted[1] / size[1])
    return max(wanted[0], round(size[0] * scale)), max(wanted[1], round(size[1] * scale))


def _drawn(
    array: np.ndarray[Any, Any], as_grey: bool, size: tuple[int, int], crop: tuple[int, int], resample: str
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Made grey, resized and cropped by Pillow; a crop larger than the picture is black at its edges."""
    try:
        from PIL import Image
    except ImportError:
        raise NeedsError("Images need Pillow", cure="pip install 'temper-ml[vision]'") from None
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image = image.convert("L") if as_grey else image
    image = image.resize(size[::-1], RESAMPLING.index(resample))
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    drawn = np.array(image.crop((left, top, left + crop[1], top + crop[0])))
    return drawn[:, :, None] if drawn.ndim == 2 else drawn


def check_pixels(pixels_BCHW: Tensor, shape: tuple[int, ...], where: str) -> None:
    """Raise DataError for pixels of another shape or type, NaN or infinity, or a range that is not [0, 1]."""
    if pixels_BCHW.ndim != 4 or tuple(pixels_BCHW.shape[1:]) != shape:
        raise DataError(
            f"Pixels of shape {tuple(pixels_BCHW.shape)} do not fit",
            where=where,
            cure=f"Give (batch, channels, height, width) with {', '.join(map(str, shape))} at the end.",
        )
    if not pixels_BCHW.is_floating_point():
        raise DataError(
            f"Pixels are {pixels_BCHW.dtype}", where=where, cure="Give floats in [0, 1]: divide by 255."
        )
    if not len(pixels_BCHW):
        return
    low, high = (float(value) for value in pixels_BCHW.detach().aminmax())
    if not np.isfinite(low + high):
        raise DataError("The pixels hold NaN or infinity", where=where, cure="Look at what made them.")
    if max(-low, high) > LARGEST_PIXEL:
        raise DataError(
            f"Pixels go from {low:g} to {high:g}", where=where, cure="They must be in [0, 1]: divide by 255."
        )


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None]


@torch.no_grad()
def _gives_scores(system: ImageClassifier, pixels_BCHW: Tensor) -> bool:
    logits_BC = system.logits(pixels_BCHW)
    return logits_BC.shape == (2, len(system.classes)) and bool(logits_BC.isfinite().all())


def _gives_gradients(system: ImageClassifier, pixels_BCHW: Tensor) -> bool:
    """A gradient reaches the pixels; no parameter's `.grad` is touched."""
    with torch.enable_grad():
        given = pixels_BCHW.clone().requires_grad_()
        (grad_BCHW,) = torch.autograd.grad(system.logits(given).square().sum(), given)
    return bool(grad_BCHW.isfinite().all()) and bool(grad_BCHW.any())


@torch.no_grad()
def _gives_features(system: ImageClassifier, pixels_BCHW: Tensor) -> bool:
    try:
        return bool(system.features(pixels_BCHW).isfinite().all())
    except ModelError:
        return False


def load_image_classifier(name: str, wanted: Wanted) -> ImageClassifier:
    """The classifier of a name: tiny:cnn, tiny:resnet, new:NETWORK:CxHxW:CLASSES[:SEED], an asset, a folder, a hub name."""
    from temper.systems.image_loading import build_named

    system = build_named(name, wanted)
    system.model.to(device=wanted.device, dtype=wanted.dtype).eval()
    return dataclasses.replace(system, device=wanted.device, spec=name)
