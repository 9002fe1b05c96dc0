"""Diagnostics of latents: sums that merge, and numbers whose value is known."""

import json
import math

import numpy as np
import pytest
import torch

import dae_diffusers.latents.diagnostics as diagnostics_module
from dae_diffusers.latents.diagnostics import (
    LatentDiagnostics,
    figure_of_latent_space,
    linear_probe_accuracy,
    plot_latent_space,
)
from dae_diffusers.latents.statistics import LatentStatistics


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def diagnose(mean, std=None):
    diagnostics = LatentDiagnostics.empty(tuple(mean.shape[1:]))
    diagnostics.add(mean, std)
    return diagnostics


def random_posteriors(num=80, channels=3, size=4):
    scale = torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)[:channels]
    mean = torch.randn(num, channels, size, size).exp() * scale + 2
    return mean, torch.rand_like(mean) * scale


def wave(cycles_x, cycles_y=0, size=8, num=40):
    """Images of one frequency, in whole cycles over the latent, with random phases."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = torch.rand(num, 1, 1, 1) * 2 * math.pi
    return torch.cos(2 * math.pi * (cycles_x * x + cycles_y * y) / size + phase)


@pytest.mark.parametrize("max_dim", [4096, 10])
@pytest.mark.parametrize("sizes", [[1] * 80, [33, 46, 1]])
def test_merged_equals_whole(monkeypatch, max_dim, sizes):
    monkeypatch.setattr(diagnostics_module, "MAX_COVARIANCE_DIM", max_dim)
    mean, std = random_posteriors()
    whole = diagnose(mean, std).summary()
    order = torch.randperm(80)
    batched = LatentDiagnostics.empty((3, 4, 4))
    for indices in order.split(sizes):
        batched.add(mean[indices], std[indices])
    processes = [diagnose(mean[rank::3], std[rank::3]) for rank in range(3)]
    for merged in (batched, sum(processes, start=LatentDiagnostics.empty((3, 4, 4)))):
        merged = merged.summary()
        assert merged.keys() == whole.keys()
        assert merged.pop("covariance_of") == ("latent" if max_dim == 4096 else "channels")
        for key, value in merged.items():
            assert value == pytest.approx(whole[key], rel=1e-9), key


def test_summary_is_json():
    summary = diagnose(*random_posteriors()).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert diagnose(random_posteriors()[0]).summary()["kl"] is None


@pytest.mark.filterwarnings("error")
def test_what_too_few_or_constant_latents_do_not_say_is_none():
    mean, std = random_posteriors()
    few = diagnose(mean[:48], std[:48])
    assert not few.has_full_covariance and diagnose(mean[:49], std[:49]).has_full_covariance
    summary = few.summary()
    assert summary["effective_rank"] is None and summary["gaussian_entropy"] is None
    assert summary["high_frequency_share"] > 0
    constant = diagnose(torch.ones(60, 3, 4, 4)).summary()
    assert json.loads(json.dumps(constant, allow_nan=False)) == constant
    assert constant["high_frequency_share"] is constant["excess_kurtosis"] is constant["gaussian_entropy"] is None


def test_mean_and_std_are_those_of_the_config():
    mean, std = random_posteriors()
    statistics = LatentStatistics.empty(3)
    statistics.add(mean, std)
    diagnostics = diagnose(mean, std)
    torch.testing.assert_close(diagnostics.mean, statistics.mean)
    torch.testing.assert_close(diagnostics.std, statistics.std)


def test_kl_is_that_of_the_distributions():
    mean, std = random_posteriors()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean.double(), std.double()), normal(0.0, 1.0))
    torch.testing.assert_close(diagnose(mean, std).kl, expected.mean(dim=(0, 2, 3)))


def test_ratio_and_dead_channels():
    mean = torch.randn(4000, 3, 1, 1) * torch.tensor([3.0, 0.0, 0.05]).view(3, 1, 1) + 5
    std = torch.tensor([4.0, 1.0, 1.0]).view(1, 3, 1, 1).expand_as(mean)
    diagnostics = diagnose(mean, std)
    np.testing.assert_allclose(diagnostics.posterior_std_ratio, [0.8, 1, 0.9988], atol=0.02)
    assert diagnostics.dead_channels.tolist() == [False, True, True]
    assert diagnostics.summary()["dead_channel_share"] == pytest.approx(2 / 3)


def test_constant_channel_of_a_deterministic_encoder_is_dead_and_hurts_nothing_else():
    mean = torch.randn(500, 2, 2, 2)
    mean[:, 1] = 0.1
    diagnostics = diagnose(mean)
    assert diagnostics.std[1] == 0 and diagnostics.dead_channels.tolist() == [False, True]
    assert diagnostics.posterior_std_ratio.tolist() == [0, 0]
    assert diagnostics.summary()["excess_kurtosis"] == pytest.approx(diagnose(mean[:, :1]).excess_kurtosis.item())
    assert diagnostics.effective_rank == pytest.approx(diagnose(mean[:, :1]).effective_rank, rel=1e-9)
    assert diagnostics.gaussian_entropy == -math.inf


def test_kurtosis_of_known_distributions():
    sign = torch.randint(2, (20000, 1, 2, 2)) * 2.0 - 1
    normal = torch.randn(20000, 1, 2, 2)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((20000, 1, 2, 2))
    kurtosis = diagnose(torch.cat([sign, normal, laplace], dim=1) * 0.3 + 10).excess_kurtosis
    torch.testing.assert_close(kurtosis, torch.tensor([-2.0, 0.0, 3.0]).double(), rtol=0, atol=0.2)


def latents_with_covariance(covariance, num, shape):
    """Latents whose sample covariance (divided by `num`) is exactly this one."""
    x = torch.randn(num, len(covariance), dtype=torch.float64)
    x = x - x.mean(dim=0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / num), x.T, upper=False).T
    return (whitened @ torch.linalg.cholesky(covariance).T).reshape(num, *shape)


def test_effective_rank_and_entropy_of_a_known_covariance():
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    within = rotation @ torch.diag(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)) @ rotation.T
    covariance = torch.block_diag(within, 100 * within)  # a second channel of another unit
    diagnostics = diagnose(latents_with_covariance(covariance, 300, (2, 2, 2)) + 3)
    share = np.array([0.4, 0.3, 0.2, 0.1] * 2) / 2
    assert diagnostics.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    normalized = share * 8  # variances relative to the channel's, which is the mean of its elements'
    entropy = 0.5 * np.log(2 * np.pi * np.e) + 0.5 * np.log(normalized).mean()
    assert diagnostics.gaussian_entropy == pytest.approx(entropy, rel=1e-9)
    assert diagnostics.covariance_of == "latent"


def test_white_latents_have_full_rank_and_the_largest_entropy():
    white = latents_with_covariance(torch.eye(8, dtype=torch.float64), 300, (2, 2, 2))
    diagnostics = diagnose(white * 5, torch.full_like(white, 0.01))
    assert diagnostics.effective_rank == pytest.approx(8, rel=1e-6)
    assert diagnostics.gaussian_entropy == pytest.approx(1.4189, abs=1e-4)
    one_direction = torch.randn(300, 1, 1, 1) * torch.ones(2, 2, 2)
    assert diagnose(one_direction, torch.full((300, 2, 2, 2), 1e-4)).effective_rank == pytest.approx(1, abs=1e-6)


def test_posterior_noise_adds_entropy_but_no_rank():
    mean = torch.randn(300, 1, 1, 1) * torch.ones(2, 2, 2)
    low, high = (diagnose(mean, torch.full_like(mean, std)) for std in (0.01, 0.5))
    assert low.gaussian_entropy < high.gaussian_entropy < 1.42
    assert low.effective_rank == pytest.approx(high.effective_rank, abs=1e-6)
    draws = diagnose(mean.repeat(300, 1, 1, 1) + 0.5 * torch.randn(90000, 2, 2, 2))  # what `std` stands for
    assert high.gaussian_entropy == pytest.approx(draws.gaussian_entropy, abs=0.01)


def test_large_latents_fall_back_to_channels(monkeypatch):
    monkeypatch.setattr(diagnostics_module, "MAX_COVARIANCE_DIM", 10)
    covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    pixels = latents_with_covariance(covariance, 40 * 9, (2,))
    diagnostics = diagnose(pixels.reshape(40, 3, 3, 2).movedim(3, 1))
    assert diagnostics.covariance_of == "channels"
    share = np.array([0.75, 0.25])
    assert diagnostics.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    expected = 0.5 * np.log(2 * np.pi * np.e) + 0.25 * np.log(1 - 0.25)
    assert diagnostics.gaussian_entropy == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "cycles, share",
    [((0, 0), 0), ((1, 0), 0), ((2, 0), 0), ((3, 0), 1), ((4, 0), 1), ((2, 1), 1), ((1, 1), 0), ((0, -3), 1)],
)
def test_high_frequency_share_of_one_wave(cycles, share):
    assert diagnose(wave(*cycles) + 4).high_frequency_share == pytest.approx(share, abs=1e-12)


def test_high_frequency_share_of_mixtures_and_noise():
    mixture = wave(1) + 2 * wave(3)  # powers 1 and 4
    assert diagnose(mixture).high_frequency_share == pytest.approx(0.8, abs=1e-6)
    units = torch.cat([wave(1), 100 * wave(3)], dim=1)  # the unit of a channel does not count
    assert diagnose(units).high_frequency_share == pytest.approx(0.5, abs=1e-6)
    assert diagnose(torch.randn(500, 1, 32, 32)).high_frequency_share == pytest.approx(0.8, abs=0.01)
    assert diagnose(torch.randn(500, 3, 1, 1)).high_frequency_share == 0


@pytest.mark.parametrize("cycles", [(1, 0), (0, 3), (2, 2), (4, 0)])
def test_radial_spectrum_finds_the_frequency_of_a_wave(cycles):
    spectrum = diagnose(wave(*cycles)).radial_spectrum
    assert spectrum.sum().item() == pytest.approx(1)
    assert spectrum[round(math.hypot(*cycles))].item() == pytest.approx(1)


def test_radial_spectrum_agrees_with_the_high_frequency_share():
    diagnostics = diagnose(wave(1) + 2 * wave(3) + torch.randn(40, 1, 1, 1))
    spectrum = diagnostics.radial_spectrum
    assert spectrum[3].item() == pytest.approx(diagnostics.high_frequency_share)
    assert spectrum[3].item() == pytest.approx(4 * spectrum[1].item(), rel=1e-6)
    assert spectrum[0] > 0


def test_picture_of_the_latent_space(tmp_path):
    mean, std = random_posteriors()
    plot_latent_space(diagnose(mean, std), tmp_path / "with.png")
    plot_latent_space(diagnose(mean), tmp_path / "without.png")
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 5000


@pytest.mark.parametrize("channels", [1, 3, 32])
def test_channels_and_components_have_whole_numbers(channels):
    for axis in figure_of_latent_space(diagnose(torch.randn(200, channels, 2, 2))).axes[::2]:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) and tick >= 0 for tick in ticks)


def test_too_few_images_are_warned_of():
    with pytest.warns(UserWarning, match="8 images for 8 latent elements"):
        _ = diagnose(torch.randn(8, 2, 2, 2)).effective_rank


def test_unusable_latents_are_refused():
    diagnostics = diagnose(torch.randn(3, 2, 2, 2), torch.ones(3, 2, 2, 2))
    with pytest.raises(ValueError, match="both must be"):
        diagnostics.add(torch.randn(3, 2, 2, 3))
    with pytest.raises(ValueError, match="both must be"):
        diagnostics.add(torch.randn(3, 2, 2, 2), torch.ones(3, 2, 1, 1))
    with pytest.raises(ValueError, match="NaN"):
        diagnostics.add(torch.full((3, 2, 2, 2), math.nan))
    with pytest.raises(ValueError, match="all batches or none"):
        diagnostics + diagnose(torch.randn(3, 2, 2, 2))
    with pytest.raises(ValueError, match="do not add up"):
        diagnostics + LatentDiagnostics.empty((2, 4, 4))
    with pytest.raises(ValueError, match="no latents"):
        LatentDiagnostics.empty((2, 2, 2)).summary()


# Linear probe


def naive_ridge(train, labels, test, ridge):
    """By gradient of the penalised mean squared error, set to 0 for weights and intercept together."""
    center, scale = train.mean(axis=0), train.std(axis=0)
    train, test = (train - center) / scale, (test - center) / scale
    num, dim = train.shape
    design = np.concatenate([train, np.ones((num, 1))], axis=1)
    penalty = np.diag([ridge] * dim + [0])
    weights = np.linalg.solve(design.T @ design / num + penalty, design.T @ np.eye(labels.max() + 1)[labels] / num)
    return (np.concatenate([test, np.ones((len(test), 1))], axis=1) @ weights).argmax(axis=1)


@pytest.mark.parametrize("num_train", [10, 60])  # fewer and more latents than their 16 elements
def test_linear_probe_equals_the_normal_equations(num_train):
    latents, labels = torch.randn(num_train + 200, 4, 2, 2), torch.randint(3, (num_train + 200,))
    latents[:, 0, 0, 0] += labels
    labels[:3] = torch.arange(3)
    train, test = slice(num_train), slice(num_train, None)
    flat = latents.flatten(1).double().numpy()
    expected = naive_ridge(flat[train], labels[train].numpy(), flat[test], 0.3)
    accuracy = linear_probe_accuracy(latents[train], labels[train], latents[test], labels[test], ridge=0.3)
    assert accuracy == pytest.approx((expected == labels[test].numpy()).mean(), abs=1e-12)


def test_linear_probe_finds_what_is_linear_and_nothing_else():
    labels = torch.randint(4, (400,))
    latents = torch.randn(400, 2, 3, 3)
    latents[:, 1, 1, :] = 5  # constant elements
    train, test = slice(300), slice(300, None)
    blind = linear_probe_accuracy(latents[train], labels[train], latents[test], labels[test])
    assert blind < 0.4
    latents[:, 0, 0, 0] = torch.eye(4)[labels] @ torch.tensor([100.0, 0.0, 0.0, 0.0])
    latents[:, 0, 0, 1] = torch.eye(4)[labels] @ torch.tensor([0.0, 1e-3, 0.0, 0.0])
    latents[:, 0, 0, 2] = torch.eye(4)[labels] @ torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert linear_probe_accuracy(latents[train], labels[train], latents[test], labels[test]) == 1


def test_unusable_probes_are_refused():
    latents, labels = torch.randn(5, 2), torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="as many integer labels"):
        linear_probe_accuracy(latents, labels[:4], latents, labels)
    with pytest.raises(ValueError, match="as many integer labels"):
        linear_probe_accuracy(latents, labels, latents, labels.float())
    with pytest.raises(ValueError, match="ridge"):
        linear_probe_accuracy(latents, labels, latents, labels, ridge=0)
