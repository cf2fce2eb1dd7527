"""What a self-distillation trains with: Caron et al. 2021, appendix C. Presets for other data: training_presets.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dino_ops.distillation import Centring
from dino_ops.multicrop import MultiCrop

GROWN_AFTER_SHARE_OF_EPOCHS = 0.75


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are the published ones.

    batch_size: images in a step, all processes together. learning_rate: for 256 images in a step, scaled linearly.
    teacher_temperature: rises from warmup_teacher_temperature within warmup_teacher_epochs. momentum: of the teacher,
    rises to 1. clip: largest norm of each parameter's gradient, 0 for none. freeze_prototypes_epochs: in which the
    head's last layer stays as it is. head_batch_norm: see ProjectionHead. koleo: weight of that regulariser.
    growing_from: see multicrop_at.
    """

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 5e-4
    final_learning_rate: float = 1e-6
    warmup_epochs: float = 10
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.996
    warmup_teacher_temperature: float = 0.04
    teacher_temperature: float = 0.04
    warmup_teacher_epochs: int = 0
    student_temperature: float = 0.1
    centre_momentum: float = 0.9
    centring: Centring = "mean"
    koleo: float = 0.0
    clip: float = 3.0
    freeze_prototypes_epochs: int = 1
    drop_path: float = 0.1
    out_dim: int = 65536
    head_layers: int = 3
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    normalise_prototypes: bool = True
    head_batch_norm: bool = False
    multicrop: MultiCrop = field(default_factory=MultiCrop)
    seed: int = 0
    growing_from: float = 1.0

    def multicrop_at(self, epoch: int, patch_size: int) -> MultiCrop:
        """How crops are made in an epoch: of growing_from of their size at first, whole in the last quarter.

        Sizes are whole patches. Small crops take less time, and the first epochs learn nearly as much from them
        (progressive resizing; Tan and Le 2021, "EfficientNetV2", section 4).
        """
        grown_after = max(min(GROWN_AFTER_SHARE_OF_EPOCHS * self.epochs, self.epochs - 1), 1)
        share = min(1.0, self.growing_from + (1 - self.growing_from) * epoch / grown_after)
        if share == 1:
            return self.multicrop

        def grown(size: int) -> int:
            return max(patch_size, round(size * share / patch_size) * patch_size)

        whole, local = grown(self.multicrop.global_size), grown(self.multicrop.local_size)
        return replace(self.multicrop, global_size=whole, local_size=local)
