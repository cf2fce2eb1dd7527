"""The front door: images in, dense features out, on whatever device this process has."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal, cast, get_args, overload

import numpy as np
import torch
from PIL import Image

from dino_ops.backbone import Position
from dino_ops.batching import BatchSizer
from dino_ops.descriptors import ChannelOrder, log_bin, order_channels
from dino_ops.devices import Precision, autocast_dtype, resolve_device, resolve_precision
from dino_ops.errors import ImageError, ModelError
from dino_ops.features import Facet, FeatureRequest, Features, LayerFacet, compute_features
from dino_ops.images import DEFAULT_MAX_PIXELS, ImageSpec, PreparedImage, patch_centres, prepare_image
from dino_ops.models import create_model
from dino_ops.saliency import check_heads
from dino_ops.transfer import Download, Transfer

ImageLike = str | PathLike[str] | bytes | Image.Image | np.ndarray
ImageList = list[ImageLike] | tuple[ImageLike, ...]
ExtraLike = dict[str, int | str] | tuple[int, str]


@dataclass
class ImageFeatures:
    """Features of one image; arrays are float32, None where not asked for.

    descriptor: (grid height, grid width, D). extra: further facets by name ("key9"), shaped like descriptor.
    saliency: (grid height, grid width), 0..1. embedding: (D,), the class token after the final norm.
    y, x: (grid height, grid width), patch centres in pixels of the original image.
    width, height: the original after EXIF orientation. model_width, model_height: what the model saw.
    """

    descriptor: np.ndarray | None
    extra: dict[str, np.ndarray]
    saliency: np.ndarray | None
    embedding: np.ndarray | None
    y: np.ndarray
    x: np.ndarray
    width: int
    height: int
    model_width: int
    model_height: int

    def binned(self, hierarchy: int = 2) -> np.ndarray:
        """The descriptor with its surroundings: (grid height, grid width, 17 * D) for two levels; see log_bin."""
        if self.descriptor is None:
            raise ValueError("there is no descriptor to bin: extract with descriptors=True")
        return log_bin(self.descriptor, hierarchy)

    def __repr__(self) -> str:
        arrays = {"descriptor": self.descriptor, **self.extra, "saliency": self.saliency, "embedding": self.embedding}
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items() if array is not None)
        return (
            f"ImageFeatures({self.width}x{self.height} image seen as {self.model_width}x{self.model_height}, "
            f"grid {self.y.shape[0]}x{self.y.shape[1]}: {shapes})"
        )


@dataclass
class BatchFeatures:
    """Features of a batch of B images of one shape, on the device; None where not asked for.

    descriptor and each of extra: (B, grid height, grid width, D). saliency: (B, grid height, grid width), 0..1.
    embedding: (B, D).
    """

    descriptor: torch.Tensor | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    saliency: torch.Tensor | None = None
    embedding: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """All tensors there are; extra ones keep their names."""
        single = {"descriptor": self.descriptor, "saliency": self.saliency, "embedding": self.embedding}
        return {name: tensor for name, tensor in single.items() if tensor is not None} | self.extra


class Extractor:
    """Dense DINO features, saliency and embeddings of images ("Deep ViT Features as Dense Visual Descriptors").

        features = Extractor("dino_vits8", stride=4)("photo.jpg")

    model: short name (dino_vits16, dinov2_vitb14_reg, dinov3_vitl16, ...) or timm name.
    weights: "pretrained", "random" or the path of a weights file; see models.create_model. seed: of random weights.
    layer, facet: which facet of which block (from 0) is the descriptor; extra: more of them out of the same pass, as
        {"layer": 9, "facet": "key"} or (9, "key"). final_norm: pass token facets through the final norm.
    stride, position: see backbone.Backbone.
    saliency_heads: heads averaged into saliency; the paper uses (0, 2, 4, 5) for dino_vits8.
    channel_order: dim_major orders channels as the reference implementation does.
    descriptors, saliency, embedding: what to compute; the pass ends after the last block that any of them needs.
    shorter_side, size (height, width), native: how images are resized; the last given of the three wins.
    resample, crop, max_pixels: see images.ImageSpec. mean, std: RGB in 0..1, by default the model's own.
    device: "auto" is this process's GPU if it has one. precision: "auto" is bfloat16 autocast on a GPU and float32
        elsewhere; results are float32 in either case. compile: torch.compile the forward pass.
    batch_size: images at a time, or "auto"; see batching.BatchSizer.

    Raises ModelError for settings that do not go together with the model or this machine.
    """

    def __init__(
        self,
        model: str = "dino_vits16",
        weights: str | PathLike[str] = "pretrained",
        *,
        layer: int = 11,
        facet: Facet = "key",
        extra: Iterable[ExtraLike] = (),
        stride: int | None = None,
        final_norm: bool = False,
        position: Position = "dino",
        saliency_heads: Literal["all"] | Sequence[int] = "all",
        channel_order: ChannelOrder = "head_major",
        descriptors: bool = True,
        saliency: bool = True,
        embedding: bool = True,
        shorter_side: int | None = 224,
        size: tuple[int, int] | None = None,
        native: bool = False,
        resample: Literal["lanczos", "bicubic"] = "lanczos",
        crop: Literal["none", "patch"] = "none",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        device: str | torch.device = "auto",
        precision: Precision = "auto",
        compile: bool = False,
        batch_size: int | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        self.name = model
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        if channel_order not in get_args(ChannelOrder):
            raise ModelError(f"channel_order is head_major or dim_major, not {channel_order!r}")
        if batch_size != "auto" and batch_size < 1:
            raise ModelError(f"batch_size is 'auto' or at least 1, not {batch_size}")
        self.image_spec = ImageSpec(
            shorter_side=None if native or size is not None else shorter_side,
            size_hw=None if native or size is None else (size[0], size[1]),
            resample=resample,
            crop=crop,
            max_pixels=max_pixels,
        )

        self.backbone = create_model(model, weights, seed=seed, stride=stride, position=position)
        self.patch_size = self.backbone.patch_size
        self.stride = self.backbone.stride
        self.embed_dim = self.backbone.embed_dim
        self.depth = self.backbone.depth
        self.num_heads = self.backbone.num_heads
        self.mean = self.backbone.mean if mean is None else tuple(mean)
        self.std = self.backbone.std if std is None else tuple(std)

        self._descriptor = LayerFacet(layer, facet) if descriptors else None
        self._extra = [_as_layer_facet(entry) for entry in extra]
        self._channel_order: ChannelOrder = channel_order
        self._request = FeatureRequest(
            facets=frozenset(self._extra) | ({self._descriptor} if self._descriptor else set()),
            saliency=saliency,
            saliency_heads=tuple(check_heads(saliency_heads, self.num_heads, model)) if saliency else (),
            embedding=embedding,
            final_norm=final_norm,
        )
        self._request.check(self.backbone)

        self.backbone.to(self.device)
        self._mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        self._compute = torch.compile(compute_features) if compile else compute_features
        self._sizer = BatchSizer(batch_size, self.device.type)
        self._transfer = Transfer(self.device)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a model input of height x width pixels."""
        return self.backbone.grid(height, width)

    def prepare(self, image: ImageLike) -> PreparedImage:
        """Bring one image to the size the model sees. Raises ImageError if it cannot be used.

        image: the path of a file, its bytes, a PIL image or an (H, W, 3) uint8 RGB array.
        """
        content = Path(image).read_bytes() if isinstance(image, (str, PathLike)) else image
        return prepare_image(content, self.image_spec, self.patch_size)

    @overload
    def __call__(self, images: ImageLike) -> ImageFeatures: ...

    @overload
    def __call__(self, images: ImageList) -> list[ImageFeatures]: ...

    def __call__(self, images: ImageLike | ImageList) -> ImageFeatures | list[ImageFeatures]:
        """Features of one image, or of each of a list, in order. Raises ImageError if one cannot be used."""
        if isinstance(images, (str, PathLike, bytes, Image.Image, np.ndarray)):
            return self.extract([self.prepare(images)])[0]
        return self.extract([self.prepare(image) for image in images])

    def extract(self, prepared: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Features of prepared images, in order; images of one shape go through the model together.

        Raises ImageError for an image that does not fit into the device's memory even alone.
        """
        results: dict[int, ImageFeatures] = {}
        in_flight: deque[_Batch] = deque()
        for batch in self._launch_all(prepared):
            in_flight.append(batch)
            if len(in_flight) > 1:  # the next batch is already computing while this one is unpacked
                self._unpack(in_flight.popleft(), prepared, results)
        for batch in in_flight:
            self._unpack(batch, prepared, results)
        return [results[i] for i in range(len(prepared))]

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> BatchFeatures:
        """Features, float32 and on the device, of pixels (B, H, W, 3) uint8 there."""
        grid = self.grid(pixels.shape[1], pixels.shape[2])
        normalised = (pixels.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
        dtype = autocast_dtype(self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            features = self._compute(self.backbone, normalised, self._request)
        return BatchFeatures(
            descriptor=self._as_map(features, self._descriptor, grid) if self._descriptor else None,
            extra={str(wanted): self._as_map(features, wanted, grid) for wanted in self._extra},
            saliency=None if features.saliency is None else features.saliency.float().unflatten(1, grid),
            embedding=None if features.embedding is None else features.embedding.float(),
        )

    def _as_map(self, features: Features, wanted: LayerFacet, grid: tuple[int, int]) -> torch.Tensor:
        """(B, patches, D) -> (B, grid height, grid width, D), contiguous."""
        channels = features.facets[wanted]
        if wanted.facet != "token":
            channels = order_channels(channels, self.num_heads, self._channel_order)
        return channels.float().unflatten(1, grid).contiguous()

    def _launch_all(self, prepared: Sequence[PreparedImage]) -> Iterator[_Batch]:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(prepared):
            by_shape.setdefault(image.pixels.shape, []).append(i)
        for shape, indices in by_shape.items():
            rows, columns = self.grid(shape[0], shape[1])
            tokens = rows * columns + self.backbone.num_prefix_tokens
            while indices:
                size = self._sizer.images(tokens)
                batch, indices = indices[:size], indices[size:]
                try:
                    yield from self._sizer.run(batch, tokens, lambda part: self._launch(part, prepared))
                except torch.OutOfMemoryError as e:
                    raise ImageError(
                        f"an image of {shape[1]} x {shape[0]} pixels ({rows} x {columns} patches at stride "
                        f"{self.stride}) does not fit into the memory of {self.device} even alone"
                    ) from e

    def _launch(self, indices: Sequence[int], prepared: Sequence[PreparedImage]) -> _Batch:
        pixels = self._transfer.upload([prepared[i].pixels for i in indices])
        return _Batch(list(indices), self._transfer.download(self.forward(pixels).named()))

    def _unpack(self, batch: _Batch, prepared: Sequence[PreparedImage], results: dict[int, ImageFeatures]) -> None:
        arrays = batch.download.wait()
        for row, i in enumerate(batch.indices):
            image = prepared[i]
            height, width = image.pixels.shape[:2]
            y, x = patch_centres(self.grid(height, width), self.stride, self.patch_size, image.scale_y, image.scale_x)
            own = {name: array[row] for name, array in arrays.items()}
            results[i] = ImageFeatures(
                descriptor=own.get("descriptor"),
                extra={str(wanted): own[str(wanted)] for wanted in self._extra},
                saliency=own.get("saliency"),
                embedding=own.get("embedding"),
                y=y,
                x=x,
                width=image.width,
                height=image.height,
                model_width=width,
                model_height=height,
            )


@dataclass
class _Batch:
    indices: list[int]
    download: Download


def _as_layer_facet(entry: ExtraLike) -> LayerFacet:
    layer, facet = (entry["layer"], entry.get("facet", "key")) if isinstance(entry, dict) else entry
    if facet not in get_args(Facet):
        raise ModelError(f"facet is key, query, value or token, not {facet!r}")
    return LayerFacet(int(layer), cast("Facet", facet))
