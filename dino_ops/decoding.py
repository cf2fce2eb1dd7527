"""Untrusted bytes to an upright 8-bit RGB image, or an ImageError: nothing else leaves this module."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import cast

import numpy as np
from PIL import ExifTags, Image, ImageCms

from dino_ops.errors import ImageError

# Raster formats that Pillow decodes itself. Left out: EPS, WMF and the stub formats (they start other programs or
# handlers), further containers (ICNS, CUR, BLP, ...: the picture inside may be far larger than the container says, so
# its size cannot be checked before decoding; ICO, which websites are full of, is checked by `_check_icon`), and
# formats that hold measurements, not pictures (FITS, SPIDER). The formats without a signature come last, as they would
# claim anything.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "DIB", "MSP", "PCX", "DCX", "DDS"),
    *(
        "HEIF",
        "FLI",
        "FTEX",
        "PIXAR",
        "PSD",
        "QOI",
        "SGI",
        "SUN",
        "XBM",
        "XPM",
        "XVTHUMB",
        "IM",
        "IMT",
        "PCD",
        "ICO",
        "TGA",
    ),
)

_ICON = b"\0\0\1\0"
_HEIF = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftyphevx", b"ftypmif1", b"ftypmsf1")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, max_pixels: int, least_side: int | None = None) -> Image.Image:
    """The first frame of an image file as an upright 8-bit RGB image.

    data: the whole file. max_pixels: larger images are refused from their header, before any pixel is decoded.
    least_side: a JPEG may be decoded at a half, quarter or eighth of its size, which is many times faster, as long as
    its shorter side keeps this many pixels.

    EXIF orientation is applied; an unreadable EXIF block counts as absent. Alpha is dropped, as the reference does.
    16-bit integers map 0..65535 to 0..255; `_eight_bits` has the rule for 32-bit and floating-point pixels.

    Raises ImageError, and nothing else, for anything wrong with `data`.
    """
    if not data:
        raise ImageError("the file is empty")
    with _pillow_warnings_ignored:
        with _reported_as_image_error():
            if data.startswith(_ICON):
                _check_icon(data, max_pixels)  # Pillow decodes icons while it opens them
            image = _open(data)
            if least_side is not None and image.format == "JPEG":
                _check_size(image, max_pixels)
                image.draft("RGB", (least_side, least_side))
        return orient_and_convert(image, max_pixels)


def orient_and_convert(image: Image.Image, max_pixels: int) -> Image.Image:
    """An opened PIL image of any mode as an upright 8-bit RGB image; it is loaded only if its size is acceptable."""
    _check_size(image, max_pixels)
    with _pillow_warnings_ignored, _reported_as_image_error():
        image.load()
        _check_size(image, max_pixels)  # a GIF's first frame may exceed the screen its header declares
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


@cache
def _load_plugins() -> None:
    """Make every decoder known to Pillow: its own, and HEIF (the format of phones) where pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _open(data: bytes) -> Image.Image:
    """Parse the header with the first accepted format that recognises it.

    Does what Image.open does, less its bomb check: that one reads a process-wide limit (Image.MAX_IMAGE_PIXELS),
    which cannot be changed for one caller while other threads decode.
    """
    _load_plugins()
    reasons = []
    for name in FORMATS:
        if name not in Image.OPEN:
            continue  # this build of Pillow lacks the decoder
        factory, accept = Image.OPEN[name]
        try:
            recognised = accept(data[:16]) if accept else True
            if recognised and not isinstance(recognised, str):
                return factory(io.BytesIO(data), "")
        except Exception as e:
            recognised = f"{name}: {str(e) or type(e).__name__}"
        if accept and isinstance(recognised, str):  # a decoder that is missing, or a header that is broken
            reasons.append(recognised)
    if reasons:
        raise ImageError("the image header is broken (" + "; ".join(reasons) + ")")
    if data[4:12] in _HEIF and "HEIF" not in Image.OPEN:
        raise ImageError('HEIF images need another package: pip install "dinoray[heif]"')
    raise ImageError(f"not an image in an accepted format ({len(data):,} bytes that begin with {data[:8]!r})")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"the image has no pixels: it is {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(f"the image is {width} x {height} pixels, more than the {max_pixels:,} allowed")


def _check_icon(data: bytes, max_pixels: int) -> None:
    """Refuse an ICO any of whose pictures is too large; the directory's own sizes are one byte and prove nothing."""
    (count,) = struct.unpack_from("<H", data, 4)
    for index in range(count):
        size, offset = struct.unpack_from("<II", data, 6 + 16 * index + 8)
        picture = data[offset : offset + size]
        if picture.startswith(b"\x89PNG"):
            width, height = struct.unpack_from(">II", picture, 16)
        elif picture.startswith(b"\x0c\0\0\0"):  # the oldest bitmap header
            width, height = struct.unpack_from("<HH", picture, 4)
        else:
            width, height = struct.unpack_from("<ii", picture, 4)  # the height counts the mask below the picture
        if abs(width * height) > max_pixels:
            raise ImageError(f"the icon holds {width} x {abs(height)} pixels, more than the {max_pixels:,} allowed")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Broken EXIF fails in as many ways as broken pixels do, and the pixels are good.
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()  # detached from the file
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only when converting in place
        return converted
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Grey pixels (H, W) of more than 8 bits, integer or floating point, as (H, W) uint8.

    Integers in 0..65535 divide by 257. Floats in 0..1 multiply by 255; floats in 0..255 stay. Any other range
    carries no convention, so it is stretched from its minimum to its maximum. NaN and infinities become 0.
    """
    values = grey.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(grey.shape, np.uint8)
    low, high = values[finite].min(), values[finite].max()
    if grey.dtype.kind in "iu" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    stretched = (np.where(finite, values, low) - low) / max(high - low, np.finfo(np.float64).tiny) * 255
    return np.where(finite, np.rint(stretched), 0).astype(np.uint8)


@contextmanager
def _reported_as_image_error() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except MemoryError as e:
        raise ImageError("the image does not fit into memory") from e
    except Exception as e:  # Pillow's plugins raise nearly every built-in exception on damaged files
        raise ImageError(f"the image cannot be decoded: {str(e) or type(e).__name__}") from e


class _PillowWarningsIgnored:
    """Keeps Pillow's warnings about damaged files out of the log while any thread decodes.

    warnings.catch_warnings replaces a process-wide list on entry and on exit, so threads that overlap can leave it
    wrong forever. Here the first thread puts one entry in, and the last one takes the same entry out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._entry: tuple | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._entry = warnings.filters[0]

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0 and self._entry in warnings.filters:
                cast("list", warnings.filters).remove(self._entry)


_pillow_warnings_ignored = _PillowWarningsIgnored()
