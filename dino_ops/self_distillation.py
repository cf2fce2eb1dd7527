"""Self-distillation with no labels: a student learns to say of any crop what its own average says of whole images.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), algorithm 1.

Where torch.distributed is initialised, each process gives `step` an equal share of the batch, and all do what one
would do with the whole. Nothing here draws from the process's random state: a training that is put together from its
`state_dict` continues as if it had not been stopped.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dino_ops.backbone import Backbone
from dino_ops.devices import Precision, autocast_dtype, resolve_precision
from dino_ops.distillation import DistillationLoss, koleo, mean_entropy
from dino_ops.errors import ModelError
from dino_ops.multicrop import GLOBAL_CROPS, Crops
from dino_ops.projection_head import ProjectionHead
from dino_ops.recipe import Recipe
from dino_ops.schedules import cosine_schedule, temperature_schedule
from dino_ops.stochastic_depth import announce_kept, draw_kept, install_stochastic_depth
from dino_ops.training_steps import clip_each_gradient, drop_gradients, follow, parameter_groups


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    loss (the KoLeo term left out), teacher_entropy, divergence, centre_norm: scalar tensors on the device, see
    Monitors, of this process's share of the batch. The other values come from the schedules.
    """

    loss: torch.Tensor
    teacher_entropy: torch.Tensor
    divergence: torch.Tensor
    centre_norm: torch.Tensor
    learning_rate: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


class Network(nn.Module):
    """A backbone and the projection head on its class token."""

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ProjectionHead(
            backbone.embed_dim,
            recipe.out_dim,
            layers=recipe.head_layers,
            hidden_dim=recipe.hidden_dim,
            bottleneck_dim=recipe.bottleneck_dim,
            normalise_prototypes=recipe.normalise_prototypes,
            batch_norm=recipe.head_batch_norm,
        )

    def forward(self, crops: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised pixels, one tensor (n, 3, H, W) for every size -> logits (sum of n, out_dim), tokens (.., D)."""
        tokens = torch.cat([self.backbone.class_tokens(pixels) for pixels in crops])
        return self.head(tokens), tokens


class SelfDistillation:
    """Student, teacher, loss and optimiser, and the step that moves them.

    backbone, teacher_backbone: two equal models, as `create_model` gives them; they become this object's.
    steps_per_epoch: the schedules count in epochs. accumulate: parts in which a process's share of a batch is computed,
    to save memory; the result is the same, except that KoLeo looks for neighbours within a part, and batch
    normalisation of the head for its mean.

    Raises ModelError for a backbone without a class token, which self-distillation trains.
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher_backbone: Backbone,
        recipe: Recipe,
        steps_per_epoch: int,
        *,
        device: torch.device | None = None,
        precision: Precision = "float32",
        accumulate: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if not backbone.has_class_token:
            raise ModelError(f"{backbone.name} has no class token, which is what self-distillation trains: use another")
        self.recipe = recipe
        self.device = device or torch.device("cpu")
        self.accumulate = accumulate
        self.steps = recipe.epochs * steps_per_epoch
        self._steps_per_epoch = steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(recipe.seed)
            student = Network(backbone, recipe)
            teacher = Network(teacher_backbone, recipe)
        self._depths = install_stochastic_depth(backbone.blocks, recipe.drop_path)
        self.student = student.to(self.device).train()
        self.student.backbone.requires_grad_(True)
        self.teacher = teacher.to(self.device).train().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        crops = GLOBAL_CROPS + recipe.multicrop.local_crops
        self.loss = DistillationLoss(
            recipe.out_dim,
            crops,
            student_temperature=recipe.student_temperature,
            centre_momentum=recipe.centre_momentum,
            centring=recipe.centring,
        ).to(self.device)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.student), lr=0.0, fused=True)
        self._dtype = autocast_dtype(resolve_precision(precision, self.device))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16)
        self._rank, self._processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._parallel: Any = DistributedDataParallel(self.student) if self._processes > 1 else self.student
        self._mean = torch.tensor(mean or backbone.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(std or backbone.std, device=self.device).view(1, 3, 1, 1)
        self._schedules = self._make_schedules()

    def step(self, number: int, crops: Crops) -> StepReport:
        """Train on this process's share of a batch. number: of the step, from 0."""
        recipe = self.recipe
        learning_rate, weight_decay, momentum, temperature = (float(schedule[number]) for schedule in self._schedules)
        for at, group in enumerate(self.optimiser.param_groups):
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay if at == 0 else 0.0
        parts = [crops.of(share) for share in _shares(crops.images, self.accumulate)]
        # in a step of several parts the assignments are of the whole batch, as without parts
        pixels = [self._pixels(part.whole) for part in parts]
        with torch.no_grad(), self._autocast():
            logits = [self.teacher([whole])[0].unflatten(0, (GLOBAL_CROPS, -1)) for whole in pixels]
        assignments = self.loss.targets(torch.cat(logits, dim=1).flatten(0, 1), temperature)
        centre_norm, entropy = self.loss.centre.norm(), mean_entropy(assignments)
        assignments = assignments.unflatten(0, (GLOBAL_CROPS, -1))

        kept = self._draw(number, crops.images)
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for share, part, whole in zip(_shares(crops.images, self.accumulate), parts, pixels, strict=True):
            weight = part.images / crops.images
            last = share.stop == crops.images
            with contextlib.nullcontext() if last or self._processes == 1 else self._parallel.no_sync():
                loss, regulariser = self._loss(part, whole, assignments[:, share], kept[:, :, share])
                self.scaler.scale((loss + recipe.koleo * regulariser) * weight).backward()
            total += loss.detach() * weight
        self._update(number, momentum)
        return StepReport(
            total, entropy, total - entropy, centre_norm, learning_rate, weight_decay, momentum, temperature
        )

    @torch.no_grad()
    def embed(self, images: np.ndarray) -> np.ndarray:
        """The teacher's class tokens, (n, D) float32, of images (n, S, S, 3) uint8."""
        with self._autocast():
            return self.teacher.backbone.class_tokens(self._pixels(images)).float().cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on: tensors and plain values."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimiser.state_dict(),
            "dino_loss": self.loss.state_dict(),
            "fp16_scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimiser.load_state_dict(state["optimizer"])
        self.loss.load_state_dict(state["dino_loss"])
        self.scaler.load_state_dict(state["fp16_scaler"])

    def is_finite(self) -> bool:
        """Whether every weight of the student is a number; a step with a finite loss may still have broken them."""
        norms = torch._foreach_norm(list(self.student.parameters()))
        return bool(torch.stack(norms).isfinite().all())

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """The teacher's backbone under timm's names, float32 on the CPU: what features are extracted with."""
        return {name: tensor.float().cpu() for name, tensor in self.teacher.backbone.vit.state_dict().items()}

    def _loss(
        self, part: Crops, whole: torch.Tensor, assignments: torch.Tensor, kept: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy, KoLeo) of the student for some images."""
        sizes = [whole, self._pixels(part.local)] if len(part.local) else [whole]
        passes = [kept[:, :GLOBAL_CROPS], kept[:, GLOBAL_CROPS:]][: len(sizes)]
        announce_kept(self._depths, [rows.reshape(len(rows), -1) for rows in passes], self.device)
        with self._autocast():
            logits, tokens = self._parallel(sizes)
        loss = self.loss.cross_entropy(logits, assignments.flatten(0, 1))
        if not self.recipe.koleo:
            return loss, torch.zeros((), device=self.device)
        per_crop = tokens[: GLOBAL_CROPS * part.images].unflatten(0, (GLOBAL_CROPS, -1))
        return loss, sum((koleo(crop) for crop in per_crop), torch.zeros((), device=self.device))

    def _update(self, number: int, momentum: float) -> None:
        self.scaler.unscale_(self.optimiser)
        if self.recipe.clip:
            clip_each_gradient(self.student.parameters(), self.recipe.clip)
        if number < self.recipe.freeze_prototypes_epochs * self._steps_per_epoch:
            drop_gradients(self.student.head.last_layer.parameters())
        self.scaler.step(self.optimiser)
        self.scaler.update()
        follow(self.teacher, self.student, momentum)

    def _draw(self, number: int, images: int) -> np.ndarray:
        """Which crops of this process's images keep each residual branch: (branches, crops, images) bool."""
        crops = GLOBAL_CROPS + self.recipe.multicrop.local_crops
        kept = draw_kept(self._depths, crops * images * self._processes, self.recipe.seed, number)
        of_all = kept.reshape(len(kept), crops, images * self._processes)
        return of_all[:, :, self._rank * images : (self._rank + 1) * images]

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        """(..., S, S, 3) uint8 -> normalised pixels (n, 3, S, S) on the device."""
        # what comes out of shared memory is read-only, which torch warns of
        writable = np.require(images, requirements=["C", "W"])
        pixels = torch.from_numpy(writable).to(self.device, non_blocking=True)
        pixels = pixels.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
        return (pixels - self._mean) / self._std

    def _autocast(self) -> Any:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def _make_schedules(self) -> list[np.ndarray]:
        """Learning rate, weight decay, momentum and teacher's temperature of every step."""
        recipe, steps = self.recipe, self.steps
        peak = recipe.learning_rate * recipe.batch_size / 256
        warmup = min(round(recipe.warmup_epochs * self._steps_per_epoch), steps)
        temperatures = temperature_schedule(
            recipe.warmup_teacher_temperature,
            recipe.teacher_temperature,
            recipe.epochs,
            warmup_epochs=recipe.warmup_teacher_epochs,
        )
        return [
            cosine_schedule(peak, recipe.final_learning_rate, steps, warmup_iterations=warmup),
            cosine_schedule(recipe.weight_decay, recipe.final_weight_decay, steps),
            cosine_schedule(recipe.momentum, 1.0, steps),
            np.repeat(temperatures, self._steps_per_epoch),
        ]


def _shares(images: int, parts: int) -> list[slice]:
    """Neighbouring images, split into that many parts of nearly the same size."""
    edges = np.linspace(0, images, min(parts, images) + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
