"""Self-distillation against the published code's outputs, explicit loops, and two processes against one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from dino_ops.distillation import Centring, DistillationLoss, koleo, sinkhorn_knopp
from dino_ops.projection_head import ProjectionHead
from dino_ops.schedules import cosine_schedule, temperature_schedule
from dino_ops.training_steps import clip_each_gradient, drop_gradients, follow, parameter_groups


@pytest.fixture(scope="module")
def golden(data_dir: Path) -> tuple[dict[str, Any], Any]:
    about = json.loads((data_dir / "golden" / "dino_training.json").read_text())
    return about, np.load(data_dir / "golden" / "dino_training.npz")


def test_losses_gradients_and_centres_are_the_published_ones(golden: tuple[dict[str, Any], Any]) -> None:
    about, arrays = golden
    loss = DistillationLoss(about["out_dim"], about["crops"])
    temperatures = temperature_schedule(
        about["warmup_teacher_temp"], about["teacher_temp"], about["epochs"],
        warmup_epochs=about["warmup_teacher_temp_epochs"],
    )  # fmt: skip
    np.testing.assert_allclose(temperatures, arrays["teacher_temp"], atol=1e-12)
    for step in range(3):
        student = torch.tensor(arrays[f"student_{step}"], requires_grad=True)
        teacher = torch.tensor(arrays[f"teacher_{step}"])
        value, _ = loss(student, teacher, float(temperatures[int(arrays[f"epoch_{step}"])]))
        value.backward()
        assert float(value.detach()) == pytest.approx(float(arrays[f"loss_{step}"]), abs=1e-5)
        np.testing.assert_allclose(student.grad, arrays[f"student_grad_{step}"], atol=1e-5)
        np.testing.assert_allclose(loss.centre, arrays[f"center_after_{step}"], atol=1e-5)


def test_the_head_is_the_published_one(golden: tuple[dict[str, Any], Any]) -> None:
    about, arrays = golden
    asked = about["head"]
    head = ProjectionHead(
        asked["in_dim"], asked["out_dim"], layers=asked["layers"], hidden_dim=asked["hidden_dim"],
        bottleneck_dim=asked["bottleneck_dim"], normalise_prototypes=asked["norm_last_layer"],
    )  # fmt: skip
    weights = {name.removeprefix("head."): torch.tensor(arrays[name]) for name in arrays if name.startswith("head.")}
    head.load_state_dict(weights)
    with torch.no_grad():
        np.testing.assert_allclose(head(torch.tensor(arrays["head_in"])), arrays["head_out"], atol=1e-5)
    assert not head.last_layer.weight_g.requires_grad and head.last_layer.weight_v.requires_grad


def test_schedules_are_the_published_ones(golden: tuple[dict[str, Any], Any]) -> None:
    about, arrays = golden
    schedule = about["schedule"]
    iterations = schedule["epochs"] * schedule["iterations_per_epoch"]
    warmup = schedule["warmup_epochs_lr"] * schedule["iterations_per_epoch"]
    rates = cosine_schedule(*schedule["lr"], iterations, warmup_iterations=warmup)
    np.testing.assert_allclose(rates, arrays["schedule_lr"], atol=1e-12)
    np.testing.assert_allclose(
        cosine_schedule(*schedule["momentum"], iterations), arrays["schedule_momentum"], atol=1e-12
    )


def test_clipping_is_the_published_one(golden: tuple[dict[str, Any], Any]) -> None:
    about, arrays = golden
    parameters = []
    for number in range(4):
        parameter = torch.nn.Parameter(torch.zeros(arrays[f"clip_in_{number}"].shape))
        parameter.grad = torch.tensor(arrays[f"clip_in_{number}"])
        parameters.append(parameter)
    clip_each_gradient([*parameters, torch.nn.Parameter(torch.zeros(2))], about["clip_grad"])
    for number, parameter in enumerate(parameters):
        np.testing.assert_allclose(parameter.grad, arrays[f"clip_out_{number}"], atol=1e-6)


def outputs(crops: int, batch: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(crops * batch, dimension, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("crops", [2, 3, 10])
def test_the_loss_is_the_mean_over_pairs_of_different_crops(crops: int) -> None:
    batch, dimension, temperature = 4, 12, 0.05
    student, teacher = outputs(crops, batch, dimension), outputs(2, batch, dimension, seed=1)
    loss = DistillationLoss(dimension, crops)
    loss.centre.normal_(generator=torch.Generator().manual_seed(2))
    centre = loss.centre[0].double().clone()
    terms = []
    for g in range(2):
        for c in range(crops):
            for image in range(batch):
                if g != c:
                    target = torch.softmax((teacher[g * batch + image].double() - centre) / temperature, dim=0)
                    said = torch.log_softmax(student[c * batch + image].double() / 0.1, dim=0)
                    terms.append(-float(target @ said))
    value, monitors = loss(student, teacher, temperature)
    assert len(terms) == (2 * crops - 2) * batch
    assert float(value) == pytest.approx(np.mean(terms), abs=1e-5)
    np.testing.assert_allclose(loss.centre[0], 0.9 * centre + 0.1 * teacher.double().mean(dim=0), atol=1e-6)
    assert 0 < float(monitors.teacher_entropy) < math.log(dimension)
    assert float(monitors.teacher_entropy + monitors.divergence) == pytest.approx(float(value), abs=1e-5)


def test_a_collapsed_teacher_shows_in_the_monitors() -> None:
    """Without an opinion the loss is ln(out_dim), as users of the published code have seen."""
    loss = DistillationLoss(16, 2)
    value, monitors = loss(torch.zeros(6, 16), torch.zeros(6, 16), 0.04)
    assert float(value) == pytest.approx(math.log(16), abs=1e-5)
    assert float(monitors.teacher_entropy) == pytest.approx(math.log(16), abs=1e-5)
    assert float(monitors.divergence) == pytest.approx(0, abs=1e-5)


def test_rows_that_are_not_whole_images_are_refused() -> None:
    with pytest.raises(ValueError, match="7 student and 2 teacher rows are not 3 and 2 crops"):
        DistillationLoss(4, 3)(torch.zeros(7, 4), torch.zeros(2, 4), 0.04)
    with pytest.raises(ValueError, match="at least 2 crops"):
        DistillationLoss(4, 1)


def test_sinkhorn_knopp_uses_every_prototype_evenly() -> None:
    assignments = sinkhorn_knopp(outputs(2, 32, 8), 0.5, iterations=50)
    np.testing.assert_allclose(assignments.sum(dim=1), 1, atol=1e-5)
    np.testing.assert_allclose(assignments.sum(dim=0), 64 / 8, atol=1e-3)
    assert torch.isfinite(sinkhorn_knopp(1e4 * outputs(2, 4, 8), 0.04)).all()


def test_koleo_is_lower_for_embeddings_that_are_spread_out() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20, 6, generator=generator)
    close = torch.ones(20, 6) + 0.01 * spread
    assert float(koleo(spread)) < float(koleo(close))
    rows = F.normalize(spread.double(), dim=1)
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(dim=1)
    assert float(koleo(spread)) == pytest.approx(-float(torch.log(distances).mean()), abs=1e-4)
    twice = torch.cat([spread, spread]).requires_grad_()
    koleo(twice).backward()
    assert twice.grad is not None and torch.isfinite(twice.grad).all()


@pytest.mark.parametrize("normalised", [True, False])
def test_prototypes_of_the_head(normalised: bool) -> None:
    head = ProjectionHead(8, 5, hidden_dim=16, bottleneck_dim=4, normalise_prototypes=normalised)
    tokens = torch.randn(3, 8)
    logits = head(tokens)
    assert float(logits.detach().abs().max()) <= 1 + 1e-6  # cosines, at first
    assert head.last_layer.weight_g.requires_grad is not normalised
    logits.sum().backward()
    assert (head.last_layer.weight_g.grad is None) is normalised


def test_matrices_decay_and_biases_do_not() -> None:
    head = ProjectionHead(8, 5, hidden_dim=16, bottleneck_dim=4)
    decayed, others = parameter_groups(head)
    assert [tuple(p.shape) for p in decayed["params"]] == [(16, 8), (16, 16), (4, 16), (5, 4)]
    assert [tuple(p.shape) for p in others["params"]] == [(16,), (16,), (4,)]
    assert others["weight_decay"] == 0
    head(torch.randn(2, 8)).sum().backward()
    drop_gradients(head.last_layer.parameters())
    assert head.last_layer.weight_v.grad is None and head.mlp[0].weight.grad is not None


def test_the_teacher_follows_every_parameter() -> None:
    teacher, student = (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)) for _ in range(2))
    before = [parameter.detach().clone() for parameter in teacher.parameters()]
    student(torch.randn(8, 2))
    follow(teacher, student, 0.75)
    for old, new, other in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new.data, 0.75 * old + 0.25 * other.data)
    assert torch.equal(teacher[1].running_mean, student[1].running_mean)
    with pytest.raises(ValueError, match="teacher and student differ"):
        follow(torch.nn.Linear(2, 3), torch.nn.Linear(3, 3), 0.9)


def test_a_warm_up_longer_than_the_training() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        cosine_schedule(1, 0, 5, warmup_iterations=6)
    np.testing.assert_allclose(temperature_schedule(0.04, 0.07, 2, warmup_epochs=4), [0.04, 0.05])


CENTRINGS: tuple[Centring, ...] = ("mean", "sinkhorn")


def _half(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for centring in CENTRINGS:
        loss, results[centring] = DistillationLoss(12, 3, centring=centring), []
        for step in range(3):
            rows = slice(4 * rank, 4 * rank + 4)
            student = outputs(3, 8, 12, seed=step).unflatten(0, (3, 8))[:, rows].flatten(0, 1)
            teacher = outputs(2, 8, 12, seed=step + 10).unflatten(0, (2, 8))[:, rows].flatten(0, 1)
            value, _ = loss(student, teacher, 0.3)
            results[centring].append((float(value), loss.centre.clone()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # test_self_distillation.py has whole steps of two processes
def test_two_processes_with_half_a_batch_are_one_with_the_whole(tmp_path: Path) -> None:
    mp.spawn(_half, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for centring in CENTRINGS:
        whole = DistillationLoss(12, 3, centring=centring)
        for step in range(3):
            value, _ = whole(outputs(3, 8, 12, seed=step), outputs(2, 8, 12, seed=step + 10), 0.3)
            said = [half[centring][step][0] for half in halves]
            assert sum(said) / 2 == pytest.approx(float(value), abs=1e-5)
            for half in halves:
                torch.testing.assert_close(half[centring][step][1], whole.centre, atol=1e-6, rtol=0)
