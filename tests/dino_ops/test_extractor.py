"""The front door, with random weights: shapes, order, settings, and features where the image has them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_ops import Extractor, ImageError, ImageFeatures, ModelError, log_bin
from dino_ops import extractor as extractor_module

MODEL = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def make() -> Callable[..., Extractor]:
    def make(model: str = MODEL, **settings: Any) -> Extractor:
        return Extractor(model, "random", device="cpu", **({"shorter_side": 64} | settings))

    return make


def same(a: ImageFeatures, b: ImageFeatures, tolerance: float = 1e-4) -> None:
    for name in ("descriptor", "saliency", "embedding", "y", "x"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance, err_msg=name)


def test_everything_at_once(make: Callable, photo: Image.Image) -> None:
    extractor = make(stride=8, layer=9, extra=[{"layer": 11, "facet": "token"}, (9, "value")])
    features = extractor(photo)
    assert (extractor.patch_size, extractor.stride, extractor.embed_dim) == (16, 8, 192)
    assert (extractor.depth, extractor.num_heads, extractor.name) == (12, 3, MODEL)
    assert (features.width, features.height, features.model_width, features.model_height) == (451, 300, 96, 64)
    assert extractor.grid(64, 96) == (7, 11)
    expected = {"descriptor": (7, 11, 192), "saliency": (7, 11), "embedding": (192,), "y": (7, 11), "x": (7, 11)}
    for name, shape in expected.items():
        array = getattr(features, name)
        assert array.shape == shape and array.dtype == np.float32 and np.isfinite(array).all(), name
    assert {name: array.shape for name, array in features.extra.items()} == dict.fromkeys(
        ("token11", "value9"), (7, 11, 192)
    )
    assert features.y[0, 0] == np.float32(8 * 300 / 64) and features.x[2, 3] == np.float32((3 * 8 + 8) * 451 / 96)
    np.testing.assert_array_equal(features.binned(), log_bin(features.descriptor))
    assert "451x300" in repr(features) and "descriptor (7, 11, 192)" in repr(features)


def test_only_what_is_asked_for(make: Callable, photo: Image.Image) -> None:
    features = make(descriptors=False, saliency=False)(photo)
    assert features.descriptor is None and features.saliency is None and features.embedding.shape == (192,)
    with pytest.raises(ValueError, match="no descriptor to bin"):
        features.binned()


def test_kinds_of_input(make: Callable, photo: Image.Image, tmp_path: Path) -> None:
    extractor = make(layer=2, saliency=False, embedding=False)
    photo.save(tmp_path / "photo.png")
    expected = extractor(photo).descriptor
    kinds = [
        str(tmp_path / "photo.png"),
        tmp_path / "photo.png",
        (tmp_path / "photo.png").read_bytes(),
        np.array(photo),
    ]
    for kind in kinds:
        np.testing.assert_array_equal(extractor(kind).descriptor, expected)
    assert [f.descriptor.shape for f in extractor(kinds)] == [expected.shape] * 4
    assert extractor([]) == []
    with pytest.raises(ImageError):
        extractor([photo, b"nonsense"])
    with pytest.raises(FileNotFoundError):
        extractor(tmp_path / "absent.png")


def test_mixed_shapes_keep_their_order(make: Callable, photo: Image.Image) -> None:
    boxes = [(0, 0, 200, 200), (100, 50, 400, 250), (50, 50, 250, 250), (0, 0, 300, 200), (60, 0, 260, 200)]
    images = [photo.crop(box) for box in boxes]
    extractor = make(batch_size=2)
    together = extractor(images)
    for image, features in zip(images, together, strict=True):
        same(features, extractor(image))
    assert together[1].model_width == 96 and together[2].model_width == 64


def test_forward_on_tensors(make: Callable, photo: Image.Image) -> None:
    extractor = make(extra=[(3, "query")])
    prepared = extractor.prepare(photo)
    batch = extractor.forward(torch.from_numpy(prepared.pixels)[None])
    features = extractor.extract([prepared])[0]
    assert set(batch.named()) == {"descriptor", "saliency", "embedding", "query3"}
    np.testing.assert_array_equal(batch.descriptor[0], features.descriptor)
    np.testing.assert_array_equal(batch.extra["query3"][0], features.extra["query3"])
    np.testing.assert_array_equal(batch.saliency[0], features.saliency)


def test_normalisation(make: Callable, photo: Image.Image) -> None:
    """Swapping mean and std for others is the same as changing the pixels accordingly."""
    assert (make().mean, make().std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = np.full((64, 64, 3), 51, np.uint8)  # 0.2
    halved = make(mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5))(grey)
    same(halved, make(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(grey))
    assert np.abs(halved.descriptor - make()(grey).descriptor).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "stride"), [("deit_tiny_patch16_224", 8), ("dinov2_vits14", 7), ("dinov3_vits16", 8)]
)
def test_a_marked_square_changes_the_patch_at_its_place(make: Callable, model: str, stride: int) -> None:
    """The image is twice the size the model sees, so coordinates must be scaled back; the first block's input is
    local, so the square's own patch must change most."""
    extractor = make(model, size=(112, 168), stride=stride, layer=0, saliency=False, embedding=False)
    canvas = np.full((224, 336, 3), 128, np.uint8)
    plain = extractor(canvas)
    patch = 2 * extractor.patch_size
    for top, left in ((64, 32), (0, 288), (192, 0)):
        marked = canvas.copy()
        marked[top : top + patch, left : left + patch] = np.random.default_rng(0).integers(0, 256, (patch, 1, 3))
        marked = marked[:224, :336]
        changed = np.linalg.norm(extractor(marked).descriptor - plain.descriptor, axis=-1)
        row, column = np.unravel_index(changed.argmax(), changed.shape)
        bottom, right = min(top + patch, 224), min(left + patch, 336)
        assert abs(plain.y[row, column] - (top + bottom) / 2) <= stride * 2
        assert abs(plain.x[row, column] - (left + right) / 2) <= stride * 2


def test_channel_orders_hold_the_same_values(make: Callable, photo: Image.Image) -> None:
    head_major = make(extra=[(5, "token")])(photo)
    dim_major = make(extra=[(5, "token")], channel_order="dim_major")(photo)
    by_head = head_major.descriptor.reshape(4, 6, 3, 64)
    np.testing.assert_array_equal(dim_major.descriptor.reshape(4, 6, 64, 3), by_head.swapaxes(-1, -2))
    np.testing.assert_array_equal(dim_major.extra["token5"], head_major.extra["token5"])


def test_bfloat16_is_close_and_comes_out_as_float32(make: Callable, photo: Image.Image) -> None:
    exact, rough = make()(photo), make(precision="bfloat16")(photo)
    assert rough.descriptor.dtype == rough.embedding.dtype == rough.saliency.dtype == np.float32
    error = np.linalg.norm(rough.descriptor - exact.descriptor) / np.linalg.norm(exact.descriptor)
    assert 1e-5 < error < 0.05


def test_out_of_memory_halves_batches(make: Callable, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = make()
    original, sizes = extractor.forward, []

    def forward(pixels: torch.Tensor) -> Any:
        sizes.append(len(pixels))
        if len(pixels) > capacity:
            raise torch.OutOfMemoryError
        return original(pixels)

    monkeypatch.setattr(extractor, "forward", forward)
    images = [photo.crop((i, 0, i + 200, 200)) for i in range(8)]
    capacity = 3
    halved = extractor(images)
    assert sizes[:3] == [8, 4, 2]
    for image, features in zip(images, halved, strict=True):
        same(features, extractor(image))
    capacity = 0
    with pytest.raises(ImageError, match=r"64 x 64 pixels \(4 x 4 patches at stride 16\) does not fit into the memory"):
        extractor(images[0])


def test_image_settings(make: Callable, photo: Image.Image) -> None:
    def seen(**settings: Any) -> tuple[int, ...]:
        extractor = make(descriptors=False, saliency=False, layer=0, **settings)
        return extractor.prepare(photo).pixels.shape[:2]

    assert seen() == (64, 96)
    assert seen(size=(80, 112)) == (80, 112)
    assert seen(native=True) == (300, 451)
    assert seen(native=True, crop="patch") == (288, 448)
    with pytest.raises(ImageError, match="more than the 1,000 allowed"):
        seen(max_pixels=1000)


def test_compiled(make: Callable, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(extractor_module.torch, "compile", lambda function: compiled.append(function) or function)
    same(make(compile=True)(photo), make()(photo))
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 12}, "which has 12 blocks: use 0 to 11"),
        ({"layer": -1}, "use 0 to 11"),
        ({"facet": "keys"}, "facet is key, query, value or token, not 'keys'"),
        ({"extra": [{"layer": 3, "facet": "attn"}]}, "not 'attn'"),
        ({"stride": 5}, "use one of 1, 2, 4, 8, 16"),
        ({"saliency_heads": [0, 3]}, "heads from 0 to 2"),
        ({"channel_order": "other"}, "channel_order is head_major or dim_major"),
        ({"batch_size": 0}, "batch_size is 'auto' or at least 1"),
        ({"precision": "float16"}, "float16 was asked for on a CPU"),
        ({"position": "centres"}, "needs rotary positions"),
        ({"model": "vit_medium_patch16_gap_256"}, "has no class token"),
    ],
)
def test_impossible_settings(make: Callable, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(**settings)


def test_orientation_reaches_the_features(make: Callable, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    extractor = make()
    same(extractor(file.getvalue()), extractor(photo))
