"""Images as data: a file, encoded bytes or pixels, decoded when they are looked at."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from temper.core.errors import DataError, NeedsError

__all__ = ["URI", "Picture"]

URI = "data:image/png;base64,"
"""How pixels stand in JSON."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One image. Make it with `from_file`, `from_bytes` or `from_array`; two are equal when their content is."""

    path: Path | None = None
    encoded: bytes | None = None
    """A whole PNG, JPEG or other file that Pillow reads."""
    pixels: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    """uint8, (H, W, C) with one or three channels."""

    @classmethod
    def from_file(cls, path: Path | str) -> Picture:
        """The image in a file, which is not opened yet."""
        return cls(path=Path(path))

    @classmethod
    def from_bytes(cls, encoded: bytes) -> Picture:
        """The image that a file's bytes hold."""
        return cls(encoded=encoded)

    @classmethod
    def from_array(cls, pixels: Any) -> Picture:
        """The image with these uint8 pixels, (H, W) or (H, W, C); raises DataError for others."""
        array = np.asarray(pixels)
        array = array[:, :, None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
            raise DataError(
                f"Pixels of type {array.dtype} and shape {array.shape} are no image",
                cure="Give uint8 pixels of shape (H, W), (H, W, 1) or (H, W, 3).",
            )
        return cls(pixels=array)

    @classmethod
    def from_uri(cls, text: str) -> Picture:
        """The image in a `data:image/...;base64,` text; raises DataError where it is not one."""
        head, _, body = text.partition(",")
        try:
            if not head.startswith("data:image/") or not head.endswith(";base64"):
                raise ValueError(head[:40])
            return cls(encoded=base64.b64decode(body, validate=True))
        except ValueError as error:
            raise DataError(
                f"Not an image in base64: {error}", cure="Write data:image/png;base64,..."
            ) from None

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Pixels as uint8, (H, W, C): one channel for grey images, else three. Raises DataError for no image."""
        if self.pixels is not None:
            return self.pixels
        with self._opened() as image:
            # Transparency goes over white, as viewers show it.
            if "A" in image.getbands() or "transparency" in image.info:
                from PIL import Image

                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith("I;16"):
                # Pillow would cut 16 bits at 255 instead of scaling them.
                return (np.array(image) >> 8).astype(np.uint8)[:, :, None]
            if image.mode in ("I", "F"):
                _check_range(np.array(image), str(self.path or "an image"))
            grey = image.mode in ("1", "L", "I", "F")
            array = np.array(image.convert("L" if grey else "RGB"))
        return array[:, :, None] if grey else array

    @cached_property
    def digest(self) -> str:
        """Hash of the decoded pixels, the same for a file, its bytes and its pixels."""
        array = self.array()
        head = repr(array.shape).encode()
        return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:32]

    def uri(self) -> str:
        """The image as a text for JSON: a file's absolute path, else a PNG in base64."""
        if self.path is not None:
            return self.path.absolute().as_posix()
        return URI + base64.b64encode(self.png()).decode()

    def png(self) -> bytes:
        """The image as a PNG file's bytes."""
        from PIL import Image

        array = self.array()
        out = io.BytesIO()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(out, "PNG")
        return out.getvalue()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Picture):
            return False
        same_file = self.path is not None and self.path == other.path
        return same_file or self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def _bytes(self) -> bytes:
        if self.encoded is not None:
            return self.encoded
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"The image cannot be read: {error.strerror}", where=str(self.path), cure="Check the path."
            ) from None

    def _opened(self) -> Any:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise NeedsError("Images need Pillow", cure="pip install 'temper-ml[vision]'") from None
        try:
            image = Image.open(io.BytesIO(self._bytes()))
            image.load()
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            where = str(self.path) if self.path else f"{len(self.encoded or b'')} bytes"
            what = str(error).partition(" <")[0]  # without the address of a buffer
            raise DataError(f"Not an image: {what}", where=where, cure="Give a PNG or JPEG file.") from None
        return image


def _check_range(pixels: np.ndarray[Any, Any], where: str) -> None:
    """Raise DataError for wide pixels that Pillow would cut to 0 to 255 without a word, NaN among them."""
    if not np.isfinite(pixels).all():
        raise DataError(
            "The image holds pixels that are not finite numbers", where=where, cure="Remove or fill them."
        )
    low, high = float(pixels.min()), float(pixels.max())
    is_share = pixels.dtype.kind == "f" and 0 < high <= 1
    if low < 0 or high > 255 or is_share:
        raise DataError(
            f"The image's pixels lie between {low:g} and {high:g}",
            where=where,
            cure="Scale them to 0 to 255 and save them as 8 bits.",
        )
