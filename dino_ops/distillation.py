"""The self-distillation loss: the student predicts, from any crop, what the teacher says of the whole image.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), section 3.1 and algorithm 1; the
Sinkhorn-Knopp centring and the KoLeo regulariser are DINOv2's (Oquab et al. 2023, section 4).

Rows of a batch are crop-major: crop 0 of every image, then crop 1, and so on; the first two crops are the global ones.
Where torch.distributed is initialised, centres and assignments are of the batches of all processes together, so that
two processes with half a batch each compute what one does with the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

GLOBAL_CROPS = 2
SINKHORN_ITERATIONS = 3

Centring = Literal["mean", "sinkhorn"]


@dataclass(frozen=True)
class Monitors:
    """What tells a collapse, as floats on the device: all of this batch and process.

    teacher_entropy: of the teacher's assignments, nats. Near 0: one prototype takes all; near ln(out_dim): no opinion.
    divergence: of the student from the teacher (KL), nats. Near 0 together with a constant entropy: nothing is learnt.
    centre_norm: length of the centre; 0 for Sinkhorn-Knopp.
    """

    teacher_entropy: torch.Tensor
    divergence: torch.Tensor
    centre_norm: torch.Tensor


class DistillationLoss(nn.Module):
    """Cross-entropy between the teacher's assignments of the global crops and the student's of all others.

    out_dim: prototypes. crops: of an image, the two global ones included. student_temperature: its softmax.
    centre_momentum: of the running mean of the teacher's output. centring: "mean" subtracts that mean (DINO),
    "sinkhorn" makes the assignments of a batch use all prototypes evenly (DINOv2).

    The centre is a buffer, so a checkpoint of the loss has it.
    """

    centre: torch.Tensor

    def __init__(
        self,
        out_dim: int,
        crops: int,
        *,
        student_temperature: float = 0.1,
        centre_momentum: float = 0.9,
        centring: Centring = "mean",
    ) -> None:
        super().__init__()
        if crops < GLOBAL_CROPS:
            raise ValueError(f"an image has at least {GLOBAL_CROPS} crops, the global ones, not {crops}")
        self.crops = crops
        self.student_temperature = student_temperature
        self.centre_momentum = centre_momentum
        self.centring = centring
        self.register_buffer("centre", torch.zeros(1, out_dim))

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, teacher_temperature: float
    ) -> tuple[torch.Tensor, Monitors]:
        """The loss, a scalar, and what to watch; the centre is moved afterwards.

        student: (crops x B, out_dim). teacher: (2 x B, out_dim). Both before any softmax, computed in float32.

        Raises ValueError for rows that are not a whole number of images.
        """
        if len(teacher) * self.crops != len(student) * GLOBAL_CROPS:
            raise ValueError(
                f"{len(student)} student and {len(teacher)} teacher rows are not {self.crops} and {GLOBAL_CROPS} "
                "crops of the same images"
            )
        norm = self.centre.norm()
        assignments = self.targets(teacher, teacher_temperature)
        loss = self.cross_entropy(student, assignments)
        entropy = mean_entropy(assignments)
        return loss, Monitors(entropy, loss.detach() - entropy, norm)

    @torch.no_grad()
    def targets(self, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        """What the student is to predict, (2 x B, out_dim); moves the centre. Once a step, for its whole batch."""
        assignments = self.assign(teacher, temperature)
        if self.centring == "mean":
            self._move_centre(teacher)
        return assignments

    def cross_entropy(self, student: torch.Tensor, assignments: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of student rows (crops x B, out_dim) for assignments (2 x B, out_dim).

        Raises ValueError for rows that are not a whole number of images.
        """
        batch, remainder = divmod(len(student), self.crops)
        if remainder or len(assignments) != GLOBAL_CROPS * batch:
            raise ValueError(f"{len(student)} rows are not {self.crops} crops of {len(assignments)} / 2 images")
        said = F.log_softmax(student.float() / self.student_temperature, dim=-1).unflatten(0, (self.crops, batch))
        # (2, crops): cross-entropy of each global crop's assignment with each crop's prediction, mean over images
        entropies = -torch.einsum("gbk,cbk->gc", assignments.unflatten(0, (GLOBAL_CROPS, batch)), said) / batch
        others = ~torch.eye(GLOBAL_CROPS, self.crops, dtype=torch.bool, device=entropies.device)
        return entropies[others].mean()

    @torch.no_grad()
    def assign(self, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        """The teacher's assignments: (n, out_dim) float32, rows sum to 1."""
        if self.centring == "sinkhorn":
            return sinkhorn_knopp(teacher, temperature)
        return F.softmax((teacher.float() - self.centre) / temperature, dim=-1)

    @torch.no_grad()
    def _move_centre(self, teacher: torch.Tensor) -> None:
        total = torch.cat([teacher.float().sum(dim=0), teacher.new_tensor([len(teacher)], dtype=torch.float32)])
        total = sum_over_processes(total)
        mean = total[:-1] / total[-1]
        self.centre.mul_(self.centre_momentum).add_(mean * (1 - self.centre_momentum))


@torch.no_grad()
def mean_entropy(assignments: torch.Tensor) -> torch.Tensor:
    """Of the rows of (n, K), nats; a scalar."""
    return torch.special.entr(assignments).sum(dim=-1).mean()


@torch.no_grad()
def sinkhorn_knopp(teacher: torch.Tensor, temperature: float, iterations: int = SINKHORN_ITERATIONS) -> torch.Tensor:
    """Assignments of a batch that use every prototype evenly: (n, K) float32, rows sum to 1.

    teacher: (n, K) of this process. The balance is over the batches of all processes.
    """
    logits = teacher.float() / temperature
    assignments = torch.exp(logits - maximum_over_processes(logits.max()))  # the shift cancels out
    prototypes = assignments.shape[1]
    rows = sum_over_processes(torch.tensor(float(len(assignments)), device=assignments.device))
    assignments /= sum_over_processes(assignments.sum())
    for _ in range(iterations):
        assignments /= sum_over_processes(assignments.sum(dim=0, keepdim=True)).clamp_min(1e-30) * prototypes
        assignments /= assignments.sum(dim=1, keepdim=True).clamp_min(1e-30) * rows
    return assignments * rows


def koleo(embeddings: torch.Tensor) -> torch.Tensor:
    """The KoLeo regulariser: minus the mean log distance of each embedding from its nearest neighbour; a scalar.

    embeddings: (n, D), n > 1, of one global crop; they are normalised. Spread-out embeddings have a lower value
    (Sablayrolles et al. 2019; DINOv2 weighs it 0.1).
    """
    directions = F.normalize(embeddings.float(), dim=-1, eps=1e-8)
    similarity = directions @ directions.T
    similarity.fill_diagonal_(-1)
    nearest = similarity.argmax(dim=1)
    distances = F.pairwise_distance(directions, directions[nearest], eps=1e-8)
    return -torch.log(distances + 1e-8).mean()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is one."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def maximum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    return _reduced(tensor, dist.ReduceOp.MAX)


def _reduced(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    reduced = tensor.clone()
    dist.all_reduce(reduced, operation)
    return reduced
