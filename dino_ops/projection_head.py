"""The head that self-distillation trains on top of the class token; it is thrown away afterwards.

Caron et al. 2021, appendix C: a three-layer MLP, a bottleneck on the unit sphere, and prototypes of unit length.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import nn

INITIAL_DEVIATION = 0.02


class ProjectionHead(nn.Module):
    """Class tokens (n, in_dim) -> logits over prototypes (n, out_dim).

    layers: of the MLP, whose last one gives the bottleneck. normalise_prototypes: keep the prototypes at length 1
    (DINO's norm_last_layer), which is steadier; without it each may grow.

    Parameters are named as in the published code, so that its checkpoints load.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        normalise_prototypes: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a head has at least one layer, not {layers}")
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        modules: list[nn.Module] = []
        for at in range(layers):
            last = at == layers - 1
            modules.append(nn.Linear(widths[at], widths[at + 1], bias=last or not batch_norm))
            if not last:
                modules += [BatchNorm(widths[at + 1]), nn.GELU()] if batch_norm else [nn.GELU()]
        self.mlp = nn.Sequential(*modules)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_DEVIATION)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not normalise_prototypes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1, p=2))


class BatchNorm(nn.Module):
    """Batch normalisation of (n, width) by the mean and variance of this very batch, of all processes together.

    torch's own SyncBatchNorm does the same on GPUs only.
    """

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self._epsilon = epsilon

    def forward(self, units: torch.Tensor) -> torch.Tensor:
        values = units.float()
        moments = torch.stack([values.mean(dim=0), values.square().mean(dim=0)])
        mean, square = mean_over_processes(moments)
        scale = self.weight * torch.rsqrt((square - mean.square()).clamp_min(0) + self._epsilon)
        return ((values - mean) * scale + self.bias).to(units.dtype)


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, which each have an equal share of the batch; gradients pass through."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    return differentiable.all_reduce(tensor, op=dist.ReduceOp.SUM) / dist.get_world_size()


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have a direction, weight_v (out, in), and a length, weight_g (out, 1).

    The same as torch's old weight_norm, whose parameter names checkpoints have.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return F.linear(points, self.weight_v * (self.weight_g / lengths))
