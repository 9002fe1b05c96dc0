"""Losses equal their formulas, written the slow way."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from dae_diffusers.losses.autoencoder import kl_loss, reconstruction_loss
from dae_diffusers.losses.flow_matching import flow_matching_loss, interpolate, sample_sigmas


def test_reconstruction_loss_equals_its_formula():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    l1 = sum(abs(x - y) for x, y in pairs) / len(pairs)
    mse = sum((x - y) ** 2 for x, y in pairs) / len(pairs)
    torch.testing.assert_close(
        reconstruction_loss(a, b, l1_weight=0.5, mse_weight=2.0), torch.tensor(0.5 * l1 + 2 * mse), rtol=1e-5, atol=0
    )


def test_kl_loss_equals_diffusers_sum_divided_by_elements():
    posterior = DiagonalGaussianDistribution(torch.randn(5, 8, 3, 3))
    torch.testing.assert_close(kl_loss(posterior), posterior.kl().mean() / (4 * 9), rtol=1e-5, atol=0)


def test_kl_loss_of_the_standard_normal_is_zero():
    assert kl_loss(DiagonalGaussianDistribution(torch.zeros(1, 4, 2, 2))) == 0


def test_losses_of_half_precision_are_computed_in_float32():
    posterior = DiagonalGaussianDistribution(torch.randn(1, 4, 2, 2).bfloat16())
    assert kl_loss(posterior).dtype == torch.float32
    a = torch.randn(1, 3, 2, 2).bfloat16()
    assert reconstruction_loss(a, a.float()).dtype == torch.float32


def test_interpolation_runs_from_data_to_noise():
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    mixed = interpolate(latents, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(mixed[0], latents[0])
    assert torch.equal(mixed[1], noise[1])
    torch.testing.assert_close(mixed[2], 0.75 * latents[2] + 0.25 * noise[2])


def test_velocity_is_the_derivative_of_the_interpolation():
    latents, noise = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    low, high = (interpolate(latents, noise, torch.tensor([s], dtype=torch.float64)) for s in (0.4, 0.401))
    assert flow_matching_loss((high - low) / 0.001, latents, noise) < 1e-12


def test_one_euler_step_of_the_true_velocity_recovers_the_data():
    latents, noise = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    sample = interpolate(latents, noise, torch.tensor([0.7]))
    torch.testing.assert_close(sample - 0.7 * (noise - latents), latents)


@pytest.mark.parametrize(("sampling", "median_spread"), [("logit_normal", 0.6745), ("uniform", math.log(3))])
def test_sigmas_have_the_stated_distribution(sampling, median_spread):
    sigmas = sample_sigmas(200_000, sampling=sampling, generator=torch.Generator().manual_seed(0))
    assert 0 <= sigmas.min() and sigmas.max() <= 1
    logits = torch.logit(sigmas.double())
    quartiles = torch.quantile(logits[:100_000], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(
        quartiles, torch.tensor([-median_spread, 0, median_spread], dtype=torch.float64), atol=0.02, rtol=0
    )


def test_shift_agrees_with_the_scheduler_that_samples():
    from diffusers import FlowMatchEulerDiscreteScheduler

    generator = torch.Generator().manual_seed(0)
    plain = sample_sigmas(64, generator=generator)
    shifted = sample_sigmas(64, shift=3.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    straight = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(scheduler.sigmas[:1000], 3 * straight / (1 + 2 * straight), rtol=1e-5, atol=1e-6)
