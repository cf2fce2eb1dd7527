"""How many images go through the model at once: found by trying, and lowered when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Beyond this many tokens a batch keeps any current accelerator busy, and more only costs memory.
MAX_CUDA_BATCH_TOKENS = 131_072
# A CPU is busy with one image; a few hide the overhead of each call. Large images go alone, to bound memory.
MAX_CPU_BATCH_TOKENS = 16_384
MAX_CPU_BATCH_IMAGES = 8
FIRST_BATCH_TOKENS = 16_384
MAX_CUDA_BATCH_IMAGES = 1024


class BatchSizer:
    """Chooses batch sizes in tokens, so that what was learnt from one image shape holds for another.

    "auto" on a GPU starts small and doubles after every full batch that went well, up to MAX_CUDA_BATCH_TOKENS.
    Running out of memory halves the batch and ends the growth. A number is used as it is, unless memory runs out.
    """

    def __init__(
        self,
        batch_size: int | Literal["auto"],
        device_type: str,
        out_of_memory: type[BaseException] = torch.OutOfMemoryError,
    ) -> None:
        self._fixed = None if batch_size == "auto" else batch_size
        self._max_images = MAX_CPU_BATCH_IMAGES if device_type == "cpu" else MAX_CUDA_BATCH_IMAGES
        self._ceiling = MAX_CPU_BATCH_TOKENS if device_type == "cpu" else MAX_CUDA_BATCH_TOKENS
        self._tokens = FIRST_BATCH_TOKENS
        self._out_of_memory = out_of_memory
        self._failing_tokens: int | None = None

    def images(self, tokens_per_image: int) -> int:
        """How many images of this many tokens to put into the next batch; at least 1."""
        if self._fixed is not None:
            size, limit = self._fixed, self._failing_tokens
            return size if limit is None else max(1, min(size, limit // 2 // tokens_per_image))
        return max(1, min(self._max_images, self._tokens // tokens_per_image))

    def run(
        self, items: Sequence[Item], tokens_per_image: int, compute: Callable[[Sequence[Item]], Result]
    ) -> list[Result]:
        """Results of `compute` on consecutive parts of items: one part, or halves of halves if memory runs out.

        Raises the out-of-memory error itself only for a single item.
        """
        try:
            results = [compute(items)]
        except self._out_of_memory:
            if len(items) == 1:
                raise
        else:
            self._succeeded(len(items) * tokens_per_image)
            return results
        # Out of the except clause: the exception's traceback would keep the failed batch's tensors alive.
        self._failed(len(items) * tokens_per_image)
        half = len(items) // 2
        return [
            *self.run(items[:half], tokens_per_image, compute),
            *self.run(items[half:], tokens_per_image, compute),
        ]

    def _succeeded(self, tokens: int) -> None:
        # A batch far below the size tried says nothing about it.
        grew_enough = 2 * tokens > self._tokens
        if self._failing_tokens is None and grew_enough:
            self._tokens = min(2 * self._tokens, self._ceiling)

    def _failed(self, tokens: int) -> None:
        self._failing_tokens = min(tokens, self._failing_tokens or tokens)
        self._tokens = self._failing_tokens // 2
