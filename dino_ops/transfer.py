"""Batches to the device and results back, overlapping with the model where the device works by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Download:
    """Results on their way to the host. `wait` ends the journey."""

    _host: dict[str, torch.Tensor]
    _done: torch.cuda.Event | None

    def wait(self) -> dict[str, np.ndarray]:
        """The arrays, float32, by name. They are copies: page-locked memory goes back for the next batch."""
        if self._done is None:
            return {name: tensor.numpy() for name, tensor in self._host.items()}
        self._done.synchronize()
        return {name: tensor.numpy().copy() for name, tensor in self._host.items()}


class Transfer:
    """Moves batches for one device.

    On a GPU uploads and downloads have streams of their own and page-locked host memory, so that the next batch
    arrives and the last one leaves while the model computes; elsewhere nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._uploads, self._downloads = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def upload(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Images (H, W, 3) uint8 of one shape -> (B, H, W, 3) uint8 on the device."""
        host = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=self._on_gpu)
        np.stack(images, out=host.numpy())
        if not self._on_gpu:
            return host.to(self._device)
        with torch.cuda.stream(self._uploads):
            batch = host.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._uploads)
        # Otherwise the next upload would use its memory again while the model reads it.
        batch.record_stream(computing)
        return batch

    def download(self, tensors: dict[str, torch.Tensor]) -> Download:
        """Start bringing tensors to the host as float32."""
        if not self._on_gpu:
            return Download({name: tensor.float().cpu() for name, tensor in tensors.items()}, None)
        self._downloads.wait_stream(torch.cuda.current_stream(self._device))
        host = {}
        with torch.cuda.stream(self._downloads):
            for name, tensor in tensors.items():
                tensor.record_stream(self._downloads)
                host[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
                host[name].copy_(tensor.float(), non_blocking=True)
            done = self._downloads.record_event()
        return Download(host, done)
