"""Self-distillation against a training loop written out in float64, itself interrupted, in parts and in processes."""

from __future__ import annotations

import io
import itertools
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from dino_ops import Extractor
from dino_ops.backbone import Backbone
from dino_ops.distillation import Centring
from dino_ops.errors import ModelError
from dino_ops.features import FeatureRequest, compute_features
from dino_ops.models import create_model
from dino_ops.multicrop import Crops, MultiCrop
from dino_ops.recipe import Recipe
from dino_ops.self_distillation import SelfDistillation, StepReport
from dino_ops.stochastic_depth import draw_kept

IMAGES = 6  # of a batch
STEPS_PER_EPOCH = 2
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
CENTRINGS: tuple[Centring, ...] = ("mean", "sinkhorn")
RECIPE = Recipe(
    epochs=5,
    batch_size=IMAGES,
    learning_rate=5e-3 * 256 / IMAGES,
    warmup_epochs=1,
    momentum=0.9,
    warmup_teacher_temperature=0.04,
    teacher_temperature=0.07,
    warmup_teacher_epochs=3,
    clip=0.02,
    drop_path=0.0,
    out_dim=40,
    hidden_dim=32,
    bottleneck_dim=16,
    multicrop=MultiCrop(32, 16, local_crops=2),
)


def tiny_vit(**options: Any) -> Any:
    """Two blocks of width 48, positions of 4 x 4 patches. No bias of keys: its gradient is nothing but rounding."""
    settings = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3, "qkv_bias": False} | options
    return timm.create_model("vit_small_patch8_224", num_classes=0, dynamic_img_size=True, **settings)


def tiny(seed: int = 0, **options: Any) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = tiny_vit(**options)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return Backbone(vit, "tiny", position="timm")


def distil(recipe: Recipe = RECIPE, **options: Any) -> SelfDistillation:
    return SelfDistillation(tiny(), tiny(), recipe, STEPS_PER_EPOCH, **options)


def batch(step: int, images: int = IMAGES, local_crops: int = 2) -> Crops:
    """Crops of images that differ in colour and pattern."""
    generator = np.random.default_rng([99, step])

    def crops(count: int, size: int) -> np.ndarray:
        noise = generator.integers(-60, 60, (count, images, size, size, 3)) + 127
        return np.clip(noise + colours, 0, 255).astype(np.uint8)

    colours = generator.integers(-120, 120, (1, images, 1, 1, 3))
    return Crops(crops(2, 32), crops(local_crops, 16))


def train(distillation: SelfDistillation, steps: range, images: int = IMAGES) -> list[StepReport]:
    return [distillation.step(step, batch(step, images)) for step in steps]


def losses(reports: list[StepReport]) -> list[float]:
    return [float(report.loss) for report in reports]


class PublishedLoop:
    """DINO's algorithm 1 in float64: timm's own forward pass, torch's weight_norm and AdamW, a loop over crop pairs.

    Starts from the parameters of a SelfDistillation with RECIPE, whatever its centring and KoLeo.
    """

    def __init__(self, start: SelfDistillation) -> None:
        self.recipe = start.recipe
        self.networks = []
        for network in (start.student, start.teacher):
            vit = tiny_vit()
            vit.load_state_dict(network.backbone.vit.state_dict())
            head = {name: tensor.double().clone() for name, tensor in network.head.state_dict().items()}
            self.networks.append((vit.double().train(), head))
        (student, head), (teacher, teacher_head) = self.networks
        self.student = dict(student.named_parameters()) | {f"head.{name}": tensor for name, tensor in head.items()}
        self.teacher = dict(teacher.named_parameters()) | {f"head.{k}": tensor for k, tensor in teacher_head.items()}
        self.trained = {name: tensor for name, tensor in self.student.items() if not name.endswith("weight_g")}
        for tensor in self.trained.values():
            tensor.requires_grad_(True)
        matrices = [tensor for tensor in self.trained.values() if tensor.ndim > 1]
        vectors = [tensor for tensor in self.trained.values() if tensor.ndim == 1]
        self.optimiser = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], lr=0, foreach=False)
        self.centre = torch.zeros(40, dtype=torch.float64)

    def logits(self, at: int, crops: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one crop of every image, (n, S, S, 3) uint8: class tokens and what the head says."""
        vit, head = self.networks[at]
        pixels = (torch.tensor(crops).double() / 255 - IMAGENET_MEAN) / IMAGENET_STD
        tokens = vit(pixels.permute(0, 3, 1, 2))
        hidden = F.gelu(F.linear(tokens, head["mlp.0.weight"], head["mlp.0.bias"]))
        hidden = F.gelu(F.linear(hidden, head["mlp.2.weight"], head["mlp.2.bias"]))
        bottleneck = F.linear(hidden, head["mlp.4.weight"], head["mlp.4.bias"])
        bottleneck = bottleneck / bottleneck.norm(dim=1, keepdim=True)
        weight = torch._weight_norm(head["last_layer.weight_v"], head["last_layer.weight_g"], 0)
        return tokens, bottleneck @ weight.T

    def targets(self, teacher: list[torch.Tensor], temperature: float) -> list[torch.Tensor]:
        if self.recipe.centring == "mean":
            return [F.softmax((logits - self.centre) / temperature, dim=1) for logits in teacher]
        scores = torch.exp(torch.cat(teacher).T / temperature)  # (prototypes, rows)
        for _ in range(3):
            scores = scores / scores.sum(dim=1, keepdim=True) / scores.shape[0]
            scores = scores / scores.sum(dim=0, keepdim=True) / scores.shape[1]
        return list((scores * scores.shape[1]).T.chunk(2))

    def step(self, number: int, crops: Crops) -> tuple[float, float]:
        """(loss, entropy of the targets)"""
        epoch, iterations = number // STEPS_PER_EPOCH, 5 * STEPS_PER_EPOCH
        rate = 5e-3 * number if number < 2 else 1e-6 + (5e-3 - 1e-6) * (1 + math.cos(math.pi * (number - 2) / 8)) / 2
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * number / iterations)) / 2
        momentum = 1 + (0.9 - 1) * (1 + math.cos(math.pi * number / iterations)) / 2
        for group, its_decay in zip(self.optimiser.param_groups, (decay, 0), strict=True):
            group["lr"], group["weight_decay"] = rate, its_decay

        student = [self.logits(0, crop) for crop in [*crops.whole, *crops.local]]
        with torch.no_grad():
            teacher = [self.logits(1, crop)[1] for crop in crops.whole]
            targets = self.targets(teacher, (0.04, 0.055, 0.07, 0.07, 0.07)[epoch])
        terms = [
            torch.sum(-target * F.log_softmax(said / 0.1, dim=-1), dim=-1).mean()
            for (q, target), (v, (_, said)) in itertools.product(enumerate(targets), enumerate(student))
            if v != q
        ]
        loss = sum(terms) / len(terms)
        regularised = loss + self.recipe.koleo * sum(_koleo(tokens) for tokens, _ in student[:2])
        self.optimiser.zero_grad()
        regularised.backward()
        for tensor in self.trained.values():
            assert tensor.grad is not None
            coefficient = 0.02 / (tensor.grad.norm() + 1e-6)
            if coefficient < 1:
                tensor.grad.mul_(coefficient)
        if epoch < 1:
            self.trained["head.last_layer.weight_v"].grad = None
        self.optimiser.step()
        with torch.no_grad():
            for name, tensor in self.teacher.items():
                tensor.mul_(momentum).add_((1 - momentum) * self.student[name])
            if self.recipe.centring == "mean":
                self.centre = 0.9 * self.centre + 0.1 * torch.cat(teacher).mean(dim=0)
        entropies = -(torch.cat(targets) * torch.log(torch.cat(targets))).nansum(dim=1)
        return float(loss.detach()), float(entropies.mean())


def _koleo(tokens: torch.Tensor) -> torch.Tensor:
    directions = tokens / tokens.norm(dim=1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for one, row in enumerate(directions):
        nearest = min((row - other).norm() for two, other in enumerate(directions) if two != one)
        total = total - torch.log(nearest)
    return total / len(directions)


@pytest.mark.parametrize(("centring", "koleo"), [("mean", 0.0), ("mean", 0.1), ("sinkhorn", 0.0)])
def test_steps_are_those_of_the_published_loop(centring: Centring, koleo: float) -> None:
    ours = distil(replace(RECIPE, centring=centring, koleo=koleo))
    loop = PublishedLoop(ours)
    start = {name: tensor.detach().clone() for name, tensor in loop.student.items()}
    for number in range(6):
        report = ours.step(number, batch(number))
        loss, entropy = loop.step(number, batch(number))
        assert float(report.loss) == pytest.approx(loss, abs=2e-5)
        assert float(report.teacher_entropy) == pytest.approx(entropy, abs=2e-5)
        assert float(report.divergence) == pytest.approx(loss - entropy, abs=4e-5)
        assert float(report.centre_norm) == pytest.approx(float(loop.centre.norm()), abs=1e-6)
    np.testing.assert_allclose(ours.loss.centre[0], loop.centre, atol=1e-6)
    for network, reference in ((ours.student, loop.student), (ours.teacher, loop.teacher)):
        parameters = {name.removeprefix("backbone.vit."): tensor for name, tensor in network.named_parameters()}
        assert parameters.keys() == reference.keys()
        for name, tensor in parameters.items():
            np.testing.assert_allclose(tensor.detach(), reference[name].detach(), atol=3e-5, err_msg=name)
    moved = [name for name, tensor in loop.student.items() if (tensor.detach() - start[name]).abs().max() > 1e-3]
    assert len(moved) == len(start) - 1  # all but weight_g, by much more than the tolerance


def assert_equal_parameters(ours: SelfDistillation, other: SelfDistillation, atol: float) -> None:
    for network, reference in ((ours.student, other.student), (ours.teacher, other.teacher)):
        for (name, tensor), expected in zip(network.named_parameters(), reference.parameters(), strict=True):
            np.testing.assert_allclose(tensor.detach(), expected.detach(), atol=atol, err_msg=name)


@pytest.mark.parametrize("centring", CENTRINGS)
@pytest.mark.parametrize("parts", [3, 4, 50])
def test_a_batch_in_parts_is_the_batch(centring: Centring, parts: int) -> None:
    """Also in parts of different sizes, 6 images in 4, and in more parts than there are images."""
    recipe = replace(RECIPE, centring=centring, drop_path=0.3)
    whole, in_parts = distil(recipe), distil(recipe, accumulate=parts)
    for expected, report in zip(train(whole, range(5)), train(in_parts, range(5)), strict=True):
        for name in ("loss", "teacher_entropy", "divergence", "centre_norm"):
            assert float(getattr(report, name)) == pytest.approx(float(getattr(expected, name)), abs=2e-5)
    torch.testing.assert_close(in_parts.loss.centre, whole.loss.centre, atol=1e-6, rtol=0)
    assert_equal_parameters(in_parts, whole, atol=3e-5)


def test_stochastic_depth_is_the_students_and_of_every_crop_and_step() -> None:
    """Each step draws for (branch, crop, image); the network's every branch gets its rows."""
    ours = distil(replace(RECIPE, drop_path=0.5))
    branches = [module for module in ours.student.modules() if hasattr(module, "kept_rows_of_coming_passes")]
    assert [branch.rate for branch in branches] == [0, 0, 0.5, 0.5]
    assert not [module for module in ours.teacher.modules() if hasattr(module, "kept_rows_of_coming_passes")]
    seen: list[list[np.ndarray]] = [[], []]
    for at, branch in enumerate(branches[2:]):
        branch.register_forward_hook(
            lambda module, inputs, output, at=at: seen[at].append((output != 0).flatten(1).any(dim=1).numpy())
        )
    for step in range(2):
        ours.step(step, batch(step))
    for at in range(2):
        rows = np.concatenate(seen[at]).reshape(2, 4, IMAGES)  # step, crop, image
        for step in range(2):
            drawn = draw_kept(branches, 4 * IMAGES, RECIPE.seed, step)[2 + at]
            np.testing.assert_array_equal(rows[step].ravel(), drawn)
        assert 0.25 < rows.mean() < 0.75


LONG: dict[Centring, int] = {"mean": 20, "sinkhorn": 5}  # steps; there is much to send for sinkhorn
LONG_RECIPE = replace(RECIPE, epochs=10, drop_path=0.1, batch_size=8, learning_rate=1e-3 * 256 / 8, clip=3.0)


def _half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share = slice(4 * rank, 4 * rank + 4)
    results = {}
    for centring, accumulate in zip(CENTRINGS, (1, 2), strict=True):
        ours = distil(replace(LONG_RECIPE, centring=centring), accumulate=accumulate)
        curve = [float(ours.step(step, batch(step, 8).of(share)).loss) for step in range(LONG[centring])]
        results[centring] = (curve, ours.loss.centre, ours.student.state_dict(), ours.teacher.state_dict())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_half_a_batch_are_one_with_the_whole(tmp_path: Path) -> None:
    mp.spawn(_half, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for centring in CENTRINGS:
        one = distil(replace(LONG_RECIPE, centring=centring))
        curve = losses(train(one, range(LONG[centring]), images=8))
        (first, *states), (second, *other_states) = (half[centring] for half in halves)
        np.testing.assert_allclose((np.array(first) + np.array(second)) / 2, curve, atol=1e-4)
        assert np.ptp(curve) > 0.1 and np.abs(np.array(first) - second).max() > 0.01
        for state, its_state in ((states, other_states), (states, None)):
            expected = its_state or [one.loss.centre, one.student.state_dict(), one.teacher.state_dict()]
            torch.testing.assert_close(state, expected, atol=0 if its_state else 1e-4, rtol=0)


@pytest.mark.parametrize("centring", CENTRINGS)
def test_a_training_put_together_from_its_state_goes_on_as_if_never_stopped(centring: Centring) -> None:
    recipe = replace(RECIPE, centring=centring, drop_path=0.2, koleo=0.1)
    undisturbed = distil(recipe)
    train(undisturbed, range(3))
    file = io.BytesIO()
    torch.save(undisturbed.state_dict(), file)
    expected = losses(train(undisturbed, range(3, 8)))

    resumed = SelfDistillation(tiny(seed=1), tiny(seed=1), recipe, STEPS_PER_EPOCH)
    assert losses(train(resumed, range(3, 4))) != expected[:1]  # another network until it is loaded
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert losses(train(resumed, range(3, 8))) == expected
    torch.testing.assert_close(resumed.state_dict(), undisturbed.state_dict(), atol=0, rtol=0)


def test_a_state_of_another_network_is_refused() -> None:
    other = SelfDistillation(tiny(depth=1), tiny(depth=1), RECIPE, STEPS_PER_EPOCH)
    with pytest.raises(RuntimeError, match="blocks"):
        distil().load_state_dict(other.state_dict())


def test_the_teacher_follows_and_prototypes_wait() -> None:
    ours = distil(replace(RECIPE, freeze_prototypes_epochs=2))
    prototypes = ours.student.head.last_layer
    for (name, tensor), other in zip(ours.student.named_parameters(), ours.teacher.parameters(), strict=True):
        assert torch.equal(tensor, other), name
        assert not other.requires_grad and tensor.requires_grad is not name.endswith("weight_g"), name
    beginning = prototypes.weight_v.detach().clone()
    for number in range(6):
        before = [parameter.clone() for parameter in ours.teacher.parameters()]
        report = ours.step(number, batch(number))
        pairs = zip(before, ours.teacher.parameters(), ours.student.parameters(), strict=True)
        for old, new, student in pairs:
            torch.testing.assert_close(new, report.momentum * old + (1 - report.momentum) * student)
        assert torch.equal(prototypes.weight_v, beginning) is (number < 4)  # two epochs of two steps
    assert all(parameter.grad is None for parameter in ours.teacher.parameters())
    assert torch.equal(prototypes.weight_g, torch.ones(RECIPE.out_dim, 1))


def test_a_training_learns() -> None:
    """The same images again and again: the loss falls, and no prototype takes all."""
    ours = distil(replace(RECIPE, epochs=20, learning_rate=1e-3 * 256 / IMAGES, clip=3.0, teacher_temperature=0.04))
    reports = [ours.step(step, batch(step % 2)) for step in range(40)]
    curve = losses(reports)
    assert np.mean(curve[-4:]) < 0.7 * np.mean(curve[:4])
    assert all(math.isfinite(loss) for loss in curve)


def test_schedules_are_per_step_and_end_where_they_should() -> None:
    recipe = replace(RECIPE, epochs=4, warmup_epochs=1.5, batch_size=64, learning_rate=5e-4)
    reports = train(SelfDistillation(tiny(), tiny(), recipe, 3), range(12))
    rates = [report.learning_rate for report in reports]
    peak = 5e-4 * 64 / 256
    np.testing.assert_allclose(rates[:5], [0, peak / 3, 2 * peak / 3, peak, peak], rtol=1e-6)
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.1 * peak
    np.testing.assert_allclose(
        [report.teacher_temperature for report in reports], np.repeat([0.04, 0.055, 0.07, 0.07], 3)
    )
    decays, momenta = ([getattr(report, name) for report in reports] for name in ("weight_decay", "momentum"))
    assert decays == sorted(decays) and decays[0] == pytest.approx(0.04) and 0.35 < decays[-1] <= 0.4
    assert momenta == sorted(momenta) and momenta[0] == pytest.approx(0.9) and 0.99 < momenta[-1] <= 1


def test_warm_up_longer_than_the_training() -> None:
    ours = SelfDistillation(tiny(), tiny(), replace(RECIPE, epochs=2, warmup_epochs=10), STEPS_PER_EPOCH)
    rates = [report.learning_rate for report in train(ours, range(4))]
    assert rates == sorted(rates) and rates[0] == 0


def test_whole_images_alone_and_crops_of_any_number_of_patches() -> None:
    ours = distil(replace(RECIPE, multicrop=MultiCrop(32, 16, local_crops=0)))
    assert all(math.isfinite(float(ours.step(step, batch(step, local_crops=0)).loss)) for step in range(3))
    grown = distil()
    sizes = [MultiCrop(size, size // 2, 2) for size in (16, 32, 48)]
    for step, multicrop in enumerate(sizes):
        crops = [
            np.zeros((n, 4, s, s, 3), np.uint8) for n, s in ((2, multicrop.global_size), (2, multicrop.local_size))
        ]
        assert math.isfinite(float(grown.step(step, Crops(*crops)).loss))


def test_crops_out_of_shared_memory_are_read_only() -> None:
    ours, writable = distil(), batch(0)
    expected = float(distil().step(0, writable).loss)
    crops = Crops(writable.whole.copy(), writable.local.copy())
    for array in (crops.whole, crops.local):
        array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(ours.step(0, crops).loss) == expected


def test_a_network_without_class_token_cannot_be_trained() -> None:
    def headless() -> Backbone:
        return tiny(class_token=False, global_pool="avg")

    with pytest.raises(ModelError, match="tiny has no class token, which is what self-distillation trains"):
        SelfDistillation(headless(), headless(), RECIPE, STEPS_PER_EPOCH)


def test_random_state_of_the_caller_stays() -> None:
    def states() -> tuple[Any, ...]:
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest

    backbones, crops = (tiny(), tiny()), batch(0)
    torch.manual_seed(12345)  # no seed that a construction would itself set
    before = states()
    ours = SelfDistillation(*backbones, replace(RECIPE, drop_path=0.5, koleo=0.1), STEPS_PER_EPOCH, accumulate=2)
    assert states() == before
    ours.step(0, crops)
    ours.embed(crops.whole[0])
    assert states() == before

    torch.manual_seed(1)
    again = distil()
    assert torch.equal(again.student.head.last_layer.weight_v, ours.student.head.last_layer.weight_v)
    other = distil(replace(RECIPE, seed=1))
    assert not torch.equal(other.student.head.last_layer.weight_v, ours.student.head.last_layer.weight_v)


def test_bfloat16_stays_close_to_float32() -> None:
    exact, mixed = distil(), distil(precision="bfloat16")
    expected, curve = (losses(train(one, range(4))) for one in (exact, mixed))
    assert curve != expected
    np.testing.assert_allclose(curve, expected, rtol=0.1)
    assert {parameter.dtype for parameter in mixed.student.parameters()} == {torch.float32}
    images = batch(0).whole[0]
    difference = np.abs(mixed.embed(images) - exact.embed(images))
    assert mixed.embed(images).dtype == np.float32
    assert difference.mean() < 0.05 * np.abs(exact.embed(images)).mean()


def test_weights_that_are_no_numbers_are_noticed() -> None:
    distillation = distil()
    assert distillation.is_finite()
    with torch.no_grad():
        distillation.student.backbone.vit.blocks[1].mlp.fc1.bias[3] = torch.nan
    assert not distillation.is_finite()


def test_what_features_are_extracted_with_is_the_teacher() -> None:
    ours = distil()
    train(ours, range(3))
    state = ours.backbone_state()
    vit = tiny_vit()
    vit.load_state_dict(state, strict=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    images = batch(7).whole[0]
    with torch.no_grad():
        pixels = (torch.tensor(images) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        expected = vit.eval()(pixels.permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(ours.embed(images), expected, atol=1e-5)
    assert np.abs(ours.embed(images) - distil().embed(images)).max() > 1e-3  # it has moved
    other = distil(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    with torch.no_grad():
        pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        tokens = other.teacher.backbone.class_tokens(pixels)
    np.testing.assert_allclose(other.embed(images), tokens, atol=1e-5)


def test_every_family_can_be_trained(make_network: Callable, family: str) -> None:
    """Each parameter gets a gradient (which several processes need), and the class token is the extracted one."""
    backbone = Backbone(make_network(family), family)
    side = 4 * backbone.patch_size
    for height, width in ((side, side), (side, side + 2 * backbone.patch_size), (2 * backbone.patch_size,) * 2):
        pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(width))
        extracted = compute_features(backbone, pixels, FeatureRequest(embedding=True)).embedding
        torch.testing.assert_close(backbone.class_tokens(pixels), extracted, atol=2e-4, rtol=1e-4)

    backbone.train().requires_grad_(True)
    pixels = torch.randn(2, 3, side, side + backbone.patch_size, generator=torch.Generator().manual_seed(0))
    backbone.class_tokens(pixels).pow(2).sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", ["dino", "dinov2", "dinov2_reg", "dinov2_swiglu", "dinov3", "dinov3_plus"])
def test_class_tokens_are_timms_at_the_models_own_grid(make_network: Callable, family: str) -> None:
    network = make_network(family)
    backbone = Backbone(network, family)
    side = (5 if "dinov2" in family else 4) * backbone.patch_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = network.forward_features(pixels)[:, 0]
    torch.testing.assert_close(backbone.class_tokens(pixels), expected, atol=1e-4, rtol=1e-4)


def test_class_tokens_of_a_whole_model_are_the_extractors_embedding() -> None:
    extractor = Extractor(
        "vit_tiny_patch16_224", "random", seed=5, size=(80, 112), descriptors=False, saliency=False, device="cpu"
    )
    backbone = create_model("vit_tiny_patch16_224", "random", seed=5)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 80, 112, 3), dtype=np.uint8)
    for shape in ((80, 112), (224, 224)):
        pixels = torch.tensor(pictures[:, : shape[0], : shape[1]]).permute(0, 3, 1, 2) / 255
        pixels = F.interpolate((pixels - 0.5) / 0.5, shape)
        tokens = backbone.class_tokens(pixels)
        if shape == (224, 224):
            torch.testing.assert_close(tokens, backbone.vit.forward_features(pixels)[:, 0], atol=1e-4, rtol=1e-4)
        else:
            embeddings = np.stack([features.embedding for features in extractor(list(pictures))])
            np.testing.assert_allclose(tokens, embeddings, atol=1e-4)
