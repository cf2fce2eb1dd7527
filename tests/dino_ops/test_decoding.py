"""Files that nobody vouches for: every one decodes rightly or is an ImageError that says why."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from dino_ops.decoding import FORMATS, decode_image
from dino_ops.errors import ImageError

MAX_PIXELS = 178_956_970


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, *extra_chunks: tuple[bytes, bytes]) -> bytes:
    """A black grey-scale PNG that declares a size and holds at most 100 rows of 100 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((1 + min(width, 100)) * min(height, 100)))
    middle = b"".join(chunk(*extra) for extra in extra_chunks)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientations(orientation: int, kind: str) -> None:
    """Four coloured quarters stored so that the tag brings them upright."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # What EXIF says of each value: where the stored rows and columns begin.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "WEBP":
        options["lossless"] = True
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    np.testing.assert_allclose(decoded(data).astype(int), upright.astype(int), atol=12)


def test_broken_exif_is_no_exif() -> None:
    grey = Image.new("RGB", (40, 30), (90, 90, 90))
    assert decoded(encoded(grey, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")).shape == (30, 40, 3)


RED = (204, 51, 51)  # a colour of the web palette, so that mode P holds it exactly


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("P", "PNG", 3),
        ("P", "GIF", 3),
        ("CMYK", "TIFF", 2),
        ("CMYK", "JPEG", 3),
        ("YCbCr", "TIFF", 3),
        ("RGB", "WEBP", 12),
        ("RGB", "AVIF", 12),
        ("RGB", "JPEG2000", 3),
        ("RGB", "BMP", 0),
        ("RGB", "PPM", 0),
        ("RGB", "TGA", 0),
    ],
)
def test_colour_modes(mode: str, kind: str, tolerance: int) -> None:
    data = encoded(Image.new("RGB", (24, 20), RED).convert(mode), kind)
    np.testing.assert_allclose(decoded(data).astype(int), np.broadcast_to(RED, (20, 24, 3)), atol=tolerance)


def test_lab() -> None:
    """CIE L*a*b* (D50) of a mid red, (53, 60, 40) by the textbook formula: about (212, 72, 65) in sRGB."""
    lab = Image.merge("LAB", [Image.new("L", (20, 20), value) for value in (135, 128 + 60, 128 + 40)])
    red, green, blue = decoded(encoded(lab, "TIFF"))[0, 0]
    assert red > 190 and green < 100 and blue < 100


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes(mode: str) -> None:
    data = encoded(Image.new("L", (24, 20), 255).convert(mode))
    assert (decoded(data) == 255).all()


def test_alpha_is_dropped_not_blended() -> None:
    assert (decoded(encoded(Image.new("RGBA", (20, 20), (*RED, 0)))) == RED).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_use_the_full_range(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256 * 20).astype(np.uint16).reshape(20, 256)
    grey = decoded(encoded(Image.fromarray(ramp), kind))
    np.testing.assert_allclose(grey[..., 0], ramp / 257, atol=0.5001)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
        ([0.0, np.nan, 1.0], [0, 0, 255]),
        ([np.inf, np.nan, np.nan], [0, 0, 0]),
        ([7.0, 7.0, 7.0], [7, 7, 7]),
        ([-7.0, -7.0, -7.0], [0, 0, 0]),
    ],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.tile(np.float32(values), (3, 1))), "TIFF")
    np.testing.assert_array_equal(decoded(data)[0, :, 0], expected)


def test_thirty_two_bit_integers() -> None:
    within = encoded(Image.fromarray(np.array([[0, 257, 65535]], np.int32)), "TIFF")
    np.testing.assert_array_equal(decoded(within)[0, :, 0], [0, 1, 255])
    beyond = encoded(Image.fromarray(np.array([[-100_000, 0, 100_000]], np.int32)), "TIFF")
    np.testing.assert_array_equal(decoded(beyond)[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    np.testing.assert_allclose(decoded(data).astype(int), np.broadcast_to(RED, (20, 20, 3)), atol=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello world, this is text", "not an image in an accepted format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in an accepted format"),
        (b"\xff\xd8\xff\xe0" + bytes(4), "the image"),
        (b"BM" + bytes(60), "the image"),
        (b"P6 0 10 255\n", "the image"),
        (png(20_000, 20_000), "the image is 20000 x 20000 pixels, more than the 178,956,970 allowed"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data, MAX_PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "AVIF"])
def test_truncated_files(photo: Image.Image, kind: str) -> None:
    data = encoded(photo, kind)
    assert decoded(data).shape == (300, 451, 3)
    for fraction in (0.2, 0.5, 0.9):
        with pytest.raises(ImageError):
            decode_image(data[: int(len(data) * fraction)], MAX_PIXELS)


def test_damaged_files_raise_nothing_else(photo: Image.Image) -> None:
    generator = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "PSD", "PPM", "TGA", "PCX", "SGI"):
        if kind == "PSD":
            data = b"8BPS\0\1" + bytes(6) + b"\0\3" + bytes(2) + b"\0\x10\0\0\0\x10\0\x08\0\x03" + bytes(40)
        else:
            data = encoded(photo.resize((60, 40)), kind)
        for _ in range(40):
            damaged = bytearray(data)
            for position in generator.integers(0, min(len(data), 400), 6):
                damaged[position] = generator.integers(0, 256)
            try:
                decode_image(bytes(damaged), 1_000_000)
            except ImageError as e:
                assert str(e)


def test_bomb_costs_no_memory() -> None:
    bomb = png(13_000, 13_000)  # 169 megapixels, below Pillow's own limit
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="13000 x 13000"):
        decode_image(bomb, 100_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_our_limit_replaces_pillows_without_touching_it() -> None:
    """An image that Pillow alone would refuse decodes when asked for, and Pillow's global stays."""
    script = """
        import io
        from PIL import Image
        from dino_ops.decoding import decode_image
        file = io.BytesIO()
        Image.new("L", (300, 300)).save(file, "PNG")
        Image.MAX_IMAGE_PIXELS = 10_000  # so that 300 x 300 is more than twice the limit
        assert decode_image(file.getvalue(), 100_000).size == (300, 300)
        assert Image.MAX_IMAGE_PIXELS == 10_000
        try:
            Image.open(io.BytesIO(file.getvalue()))
        except Image.DecompressionBombError:
            pass
        else:
            raise AssertionError("Pillow's own limit is gone")
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_pillows_warnings_do_not_leak_and_filters_are_restored() -> None:
    warner = png(20, 20, (b"acTL", bytes(8)))  # an animation without frames
    with pytest.warns(UserWarning, match="APNG"):
        Image.open(io.BytesIO(warner))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        threads = [threading.Thread(target=lambda: [decode_image(warner, 1000) for _ in range(20)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        decode_image(warner, 1000)
        assert list(warnings.filters) == before


def test_formats_that_run_programs_or_hide_sizes_are_not_accepted() -> None:
    assert not {"EPS", "WMF", "PDF", "CUR", "ICNS", "BLP", "HDF5", "GRIB", "BUFR", "MPEG", "FITS"} & set(FORMATS)
    with pytest.raises(ImageError, match="not an image in an accepted format"):
        decode_image(encoded(Image.new("RGB", (16, 16)), "ICNS"), MAX_PIXELS)


@pytest.mark.parametrize("inside", ["png", "bmp"])
def test_icons_give_their_largest_picture(inside: str) -> None:
    data = encoded(Image.new("RGB", (48, 48), RED), "ICO", sizes=[(16, 16), (48, 48)], bitmap_format=inside)
    np.testing.assert_array_equal(decoded(data), np.broadcast_to(RED, (48, 48, 3)))


@pytest.mark.parametrize(
    "inside", [png(13_000, 13_000), struct.pack("<Iii", 40, 13_000, 26_000) + bytes(28)], ids=["png", "bmp"]
)
def test_an_icon_cannot_hide_a_bomb(inside: bytes) -> None:
    directory = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="the icon holds 13000 x"):
        decode_image(directory + inside, 100_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_every_awkward_file(data_dir: Path) -> None:
    files = [path for path in sorted((data_dir / "awkward").rglob("*")) if path.is_file()]
    outcomes: dict[str, bool] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                outcomes[path.name] = decode_image(path.read_bytes(), MAX_PIXELS).mode == "RGB"
        except ImageError as e:
            assert str(e)
            outcomes[path.name] = False
    assert sum(outcomes.values()) > 0.8 * len(files)
    assert all(good for name, good in outcomes.items() if name.endswith(("it_1.jpg", "e_8.jpg", "t_8.jpg")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_orientation_examples_agree(data_dir: Path) -> None:
    for name in ("Landscape", "Portrait"):
        images = [
            decode_image((data_dir / f"awkward/exif-orientation/{name}_{i}.jpg").read_bytes(), MAX_PIXELS)
            for i in range(9)
        ]
        thumbnails = [np.asarray(image.resize((30, 30))).astype(int) for image in images]
        assert len({image.size for image in images}) == 1
        for thumbnail in thumbnails[1:]:
            assert np.abs(thumbnail - thumbnails[0]).mean() < 12


def test_photographs_of_phones() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), RED)).save(file, quality=100)
    np.testing.assert_allclose(decoded(file.getvalue()).astype(int), np.broadcast_to(RED, (48, 64, 3)), atol=4)
    with pytest.raises(ImageError, match="the image is 64 x 48 pixels"):
        decode_image(file.getvalue(), 1000)


def test_without_a_decoder_for_phones_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="not an image"):
        decode_image(b"loads the plugins", MAX_PIXELS)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(ImageError, match=r"dinoray\[heif\]"):
        decode_image(b"\0\0\0\x1cftypheic" + bytes(40), MAX_PIXELS)
