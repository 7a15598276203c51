"""Noise levels, conversions, guidance, samplers and distances, against diffusers' schedulers and values by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.ops import diffusion
from temper.ops.train import TrainSettings, train
from temper.systems import noise
from temper.systems.diffusion import Condition, load_diffusion
from temper.systems.wanted import Wanted


def schedulers() -> list:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    kinds, tables = (
        (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler),
        ("linear", "squaredcos_cap_v2"),
    )
    return [
        kind(num_train_timesteps=50, beta_schedule=table) for kind, table in itertools.product(kinds, tables)
    ]


def test_alpha_bar_by_hand() -> None:
    from diffusers import DDPMScheduler

    table = noise.alpha_bar(DDPMScheduler(trained_betas=[0.1, 0.2, 0.5]))
    assert table.tolist() == pytest.approx([0.9, 0.72, 0.36], rel=1e-6)
    assert diffusion.snr(torch.tensor([0.9, 0.5], dtype=torch.float64)).tolist() == pytest.approx([9.0, 1.0])


def test_snr_is_that_of_diffusers() -> None:
    from diffusers.training_utils import compute_snr

    scheduler = schedulers()[0]
    theirs = compute_snr(scheduler, torch.arange(50))
    assert torch.allclose(diffusion.snr(noise.alpha_bar(scheduler)), theirs.double(), rtol=1e-4)


def test_conversions_by_hand_in_float64() -> None:
    """ab = 0.64, x0 = 2, eps = -1: x_t = 0.8 * 2 - 0.6 = 1, v = 0.8 * -1 - 0.6 * 2 = -2."""
    ab, x0, eps = (torch.tensor([value], dtype=torch.float64) for value in (0.64, 2.0, -1.0))
    x_t, v = noise.add_noise(x0, eps, ab), noise.v_from(x0, eps, ab)
    assert float(x_t) == pytest.approx(1.0, abs=1e-12)
    assert float(v) == pytest.approx(-2.0, abs=1e-12)
    assert float(noise.x0_from_eps(x_t, eps, ab)) == pytest.approx(2.0, abs=1e-12)
    for output, prediction in ((eps, "epsilon"), (x0, "sample"), (v, "v_prediction")):
        assert float(noise.to_eps(output, x_t, ab, prediction)) == pytest.approx(-1.0, abs=1e-12)


@pytest.mark.parametrize("index", range(6))
def test_noising_and_velocity_are_those_of_diffusers(index: int) -> None:
    scheduler = schedulers()[index]
    x0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 20, 49])
    ab = noise.level(noise.alpha_bar(scheduler), t, x0)
    if index < 4:  # the multistep solver looks timesteps up in its own sampling grid
        assert torch.allclose(noise.add_noise(x0, eps, ab), scheduler.add_noise(x0, eps, t), atol=1e-6)
    if hasattr(scheduler, "get_velocity"):
        assert torch.allclose(noise.v_from(x0, eps, ab), scheduler.get_velocity(x0, eps, t), atol=1e-6)


def test_one_step_of_ddpm_agrees_on_x0() -> None:
    scheduler = schedulers()[0]
    x_t, eps, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor(30)
    scheduler.register_to_config(clip_sample=False)
    theirs = scheduler.step(eps, t, x_t).pred_original_sample
    ab = noise.level(noise.alpha_bar(scheduler), t.expand(2), x_t)
    assert torch.allclose(noise.x0_from_eps(x_t, eps, ab), theirs, atol=1e-5)


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert [float(noise.guided(conditional, unconditional, s)) for s in (0.0, 1.0, 2.5)] == [1.0, 3.0, 6.0]


def test_a_perfect_model_is_denoised_to_its_picture() -> None:
    """eps that always points at one x0 ends there, by every sampler."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=50, clip_sample=False)
    table, x0 = noise.alpha_bar(scheduler), torch.full((2, 1, 2, 2), 0.3)

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return noise.eps_from_x0(x_t, x0, noise.level(table, t.long().expand(2), x_t))

    before = dict(scheduler.config)
    out = noise.denoise(scheduler, predict, torch.randn(2, 1, 2, 2), 10, noise.item_generators(0, 2))
    assert torch.allclose(out, x0, atol=1e-5)
    assert dict(scheduler.config) == before
    assert scheduler.num_inference_steps is None


def test_generators_differ_by_place_and_seed_and_repeat() -> None:
    first = [torch.rand(1, generator=each).item() for each in noise.item_generators(3, 4)]
    assert len(set(first)) == 4
    assert [torch.rand(1, generator=each).item() for each in noise.item_generators(3, 2, first=2)] == first[
        2:
    ]
    assert torch.rand(1, generator=noise.item_generators(4, 1)[0]).item() != first[0]


def test_times_cover_their_range_and_no_more() -> None:
    times = diffusion.sample_times(2000, 3, 6, torch.Generator().manual_seed(0))
    assert set(times.tolist()) == {3, 4, 5}


def test_samplers_by_name() -> None:
    system = load_diffusion("tiny:unet", Wanted())
    assert type(diffusion.with_sampler(system, "dpm").scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert torch.equal(diffusion.with_sampler(system, "ddpm").alpha_bar_N, system.alpha_bar_N)
    with pytest.raises(ConfigError, match="no sampler"):
        diffusion.with_sampler(system, "dimm")


def test_noise_loss_by_hand() -> None:
    loss = diffusion.noise_loss(
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    )
    assert (float(loss.total), loss.count) == (14.0, 2)


def objective(null_share: float = 0.0) -> diffusion.DenoiseObjective:
    system = load_diffusion("tiny:unet", Wanted())
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return diffusion.DenoiseObjective(system, pictures, system.conditions([0, 1, 2, 3]), null_share)


def test_splitting_a_step_changes_nothing() -> None:
    loss = objective(null_share=0.5)
    items = [(row, 7) for row in range(4)]
    whole = loss(loss.system.model, items)["noise"]
    parts = [loss(loss.system.model, [item])["noise"] for item in items]
    assert whole.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-5)
    assert whole.count == sum(part.count for part in parts) == loss.counts(items)["noise"]


def test_a_dropped_condition_is_the_null_one() -> None:
    loss = objective(null_share=1.0)
    nothing = loss.system.nothing(2).values
    assert torch.equal(loss._condition(torch.tensor([0, 3]), [True, True]).values, nothing)
    assert loss._condition(torch.tensor([0, 3]), [False, True]).values.tolist() == [0, 4]


def test_training_lowers_the_loss() -> None:
    loss = objective()
    settings = TrainSettings(lr=3e-3, batch_rows=4, max_steps=40)
    log = train(
        loss.system.model,
        loss.system.model.parameters(),
        lambda epoch: [(row, epoch) for row in range(4)],
        loss,
        settings,
        Run(),
        length=lambda item: 64,
    )
    assert np.mean(log.loss[-10:]) < 0.8 * np.mean(log.loss[:5])


def test_the_average_starts_as_a_copy_and_then_follows() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = diffusion.averaged(model, 0.9)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    with pytest.raises(ConfigError, match="decay"):
        diffusion.averaged(model, 1.0)


def test_calls_are_counted_with_guidance() -> None:
    system = load_diffusion("tiny:unet", Wanted())
    with diffusion.counting(system.model) as calls:
        system.draw(system.conditions([0, 1]), num_steps=5, guidance=2.0)
    assert calls.rows == 2 * 5 * 2
    assert not system.model._forward_hooks


def test_frechet_distance_by_hand() -> None:
    """Along one axis: (mu - mu')^2 + (s - s')^2. Rows 0, 2 and 3, 9: means 1, 6, sds sqrt(2), sqrt(18)."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [9.0]])
    assert diffusion.frechet_distance(a, b) == pytest.approx(25 + (math.sqrt(2) - math.sqrt(18)) ** 2)


def test_frechet_distance_against_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 4, generator=rng), torch.randn(60, 4, generator=rng) * 2 + 1
    s_a, s_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    slow = float((a - b.mean(0)).mean(0).double().square().sum()) + np.trace(
        s_a + s_b - 2 * sqrtm(s_a @ s_b).real
    )
    assert diffusion.frechet_distance(a, b) == pytest.approx(slow, rel=1e-4)
    assert diffusion.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="no covariance"):
        diffusion.frechet_distance(a[:1], b)


def test_mmd_by_hand_and_its_zero() -> None:
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    k = {d: math.exp(-d * d / 2) for d in (0, 1, 2)}
    hand = k[1] + k[2] - 2 * (k[0] + k[2] + k[1] + k[1]) / 4
    assert diffusion.rbf_mmd(a, b, scale=1.0) == pytest.approx(hand)
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 2, generator=rng), torch.randn(400, 2, generator=rng)
    assert abs(diffusion.rbf_mmd(x, y)) < 0.01 < diffusion.rbf_mmd(x, y + 1)
    with pytest.raises(DataError, match="no discrepancy"):
        diffusion.rbf_mmd(a[:1], b)


def test_conditions_are_cut_together() -> None:
    both = Condition(labels_B=torch.arange(4)).take(slice(1, 3))
    assert (len(both), both.values.tolist(), both.tokens_BTD) == (2, [1, 2], None)
