"""The laws of what is done to images and latents while an autoencoder trains."""

import pytest
import torch
from torch.testing import assert_close

from dae_diffusers.losses.regularizers import (
    SpatialTransform,
    add_noise,
    interpolate_with_noise,
    mask_patches,
    perturb,
)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75])
def test_masking_hides_whole_patches(ratio):
    masked = mask_patches(torch.ones(8, 3, 16, 16), ratio, 4)
    patches = masked.unfold(2, 4, 4).unfold(3, 4, 4)[:, 0]  # (8, 4, 4, 4, 4)
    sums = patches.sum(dim=(3, 4))
    assert set(sums.flatten().tolist()) <= {0.0, 16.0}
    assert_close((sums == 0).double().mean(dim=(1, 2)), torch.full((8,), ratio, dtype=torch.float64))
    if ratio:
        assert len({tuple(row.flatten().tolist()) for row in sums}) > 1  # not the same patches everywhere


def test_masking_of_odd_sizes_keeps_the_shape():
    assert mask_patches(torch.ones(1, 1, 10, 7), 0.5, 4).shape == (1, 1, 10, 7)


def test_interpolation_with_noise_has_the_moments_of_its_formula():
    latents = torch.full((20000, 1, 2, 2), 2.0)
    noised = interpolate_with_noise(latents, 3.0)
    # t uniform: E[(1 - t) z] = z / 2; Var = z^2 / 12 + noise_scale^2 / 3
    assert_close(noised.mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    assert_close(noised.var(), torch.tensor(4 / 12 + 9 / 3), atol=0.15, rtol=0)


def test_added_noise_has_a_level_for_each_sample():
    """In units of each channel's standard deviation."""
    latents = torch.randn(4000, 2, 8, 8) * torch.tensor([1.0, 10.0]).view(1, 2, 1, 1) + 3
    noise = (add_noise(latents, 0.5) - latents) / torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    assert_close(noise.square().mean(dim=(0, 2, 3)), torch.tensor([0.25, 0.25]), atol=0.03, rtol=0)
    levels = noise.flatten(1).std(dim=1)
    assert levels.min() < 0.05 and levels.max() > 1.0


def test_latents_and_images_undergo_the_same_transform():
    """An "image" that repeats each latent 4x4 must stay that."""
    torch.manual_seed(0)
    for turns in range(4):
        transform = SpatialTransform(turns, (6, 6), 4)
        latents = torch.randn(2, 3, 6, 6)
        images = latents.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        turned = transform.of_latents(latents).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        assert torch.equal(turned, transform.of_images(images))
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    smaller = SpatialTransform(0, (4, 4), 1).of_latents(ramp)
    assert smaller.shape == (1, 1, 4, 4)
    assert_close(smaller.mean(), ramp.mean())


def test_drawn_transforms_cover_turns_and_scales():
    torch.manual_seed(0)
    drawn = [SpatialTransform.draw((8, 8), 4) for _ in range(200)]
    assert {transform.quarter_turns for transform in drawn} == {0, 1, 2, 3}
    sides = {transform.size for transform in drawn}
    assert min(sides) == (2, 2) and max(sides) == (8, 8)


def test_each_perturbation_belongs_to_its_stage():
    images = torch.rand(2, 3, 16, 16)
    nothing = perturb(images, 1, 2)
    assert nothing.inputs is images and nothing.targets is images and nothing.of_latents is None
    settings = {"mask_ratio": 0.5, "latent_denoising": 1.0, "equivariance": 1.0, "noise_tau": 0.5}
    first, second = perturb(images, 1, 2, **settings), perturb(images, 2, 2, **settings)
    assert (first.inputs == 0).any() and first.inputs.shape == images.shape
    latents = first.of_latents(torch.rand(2, 4, 8, 8))
    assert [2 * side for side in latents.shape[2:]] == list(first.targets.shape[2:])
    assert second.inputs is images and second.targets is images
    latents = torch.rand(2, 4, 8, 8)
    assert (second.of_latents(latents) != latents).all()
