"""Losses with a network of their own: their laws, and that they train what they should."""

import pytest
import torch
from accelerate import Accelerator
from models import save_backbone
from torch.testing import assert_close

from dae_diffusers.autoencoders.adversary import AdversarialTraining
from dae_diffusers.autoencoders.discriminators import BackboneDiscriminator, PatchDiscriminator
from dae_diffusers.autoencoders.loss_settings import LossConfig
from dae_diffusers.autoencoders.perceptual import load_perceptual_loss
from dae_diffusers.errors import UserError
from dae_diffusers.losses.adaptive_weight import adaptive_weight
from dae_diffusers.losses.adversarial import augment, discriminator_loss, generator_loss
from dae_diffusers.vision import FrozenBackbone, load_backbone


@pytest.fixture(params=["resnet", "vit"])
def backbone(request, tmp_path) -> FrozenBackbone:
    return load_backbone(save_backbone(tmp_path, request.param))


def test_perceptual_gradient_reaches_the_image_and_lowers_the_loss(tmp_path, backbone):
    loss = load_perceptual_loss(str(tmp_path))
    target = torch.rand(2, 3, 24, 24) * 2 - 1
    image = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    before = loss(image, target)
    before.backward()
    assert 0 < before.item() < 4
    assert (image.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in loss.parameters())
    with torch.no_grad():
        image -= 0.05 * image.grad / image.grad.norm()
    assert loss(image, target) < before
    assert loss(target, target) == 0


def test_one_channel_is_gray_and_other_numbers_are_refused(backbone):
    gray = torch.rand(2, 1, 32, 32)
    for one, three in zip(backbone(gray), backbone(gray.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(one, three)
    with pytest.raises(ValueError, match="2 channels"):
        backbone(torch.rand(1, 2, 32, 32))


def test_backbone_preprocesses_as_its_processor_says(backbone):
    seen = []
    backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    backbone(image)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    assert_close(seen[0], ((image + 1) / 2 - mean) / std)
    backbone.train()
    assert not backbone.model.training


def test_lpips_says_what_to_install():
    with pytest.raises(UserError, match="pip install lpips"):
        load_perceptual_loss("lpips")


def test_adversarial_losses_equal_their_formulas():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.5])
    assert_close(discriminator_loss(real, fake), torch.tensor(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2.5) / 3)))
    expected = 0.5 * (torch.log1p(torch.exp(-real)).mean() + torch.log1p(torch.exp(fake)).mean())
    assert_close(discriminator_loss(real, fake, "non_saturating"), expected)
    assert_close(generator_loss(fake), -fake.mean())
    assert_close(generator_loss(fake, "non_saturating"), torch.log1p(torch.exp(-fake)).mean())


def test_patch_discriminator_sees_70_pixels():
    discriminator = PatchDiscriminator(3, 8, 3)
    for layer in discriminator.modules():  # the norms look at the whole image; the receptive field is the convolutions'
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_samples_do_not_influence_each_other():
    discriminator = PatchDiscriminator(1, 8, 2)
    images = torch.randn(4, 1, 32, 32)
    assert_close(discriminator(images)[1:2], discriminator(images[1:2]))


def test_backbone_discriminator_trains_its_heads_only(backbone):
    discriminator = BackboneDiscriminator(backbone, 8)
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    discriminator(image).sum().backward()
    assert image.grad.abs().sum() > 0
    trained = {name for name, parameter in discriminator.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in discriminator.named_parameters() if name.startswith("heads.")}


def test_augmentation_moves_and_cuts_and_keeps_the_gradient():
    images = torch.full((64, 3, 16, 16), 0.5, requires_grad=True)
    augmented = augment(images)
    blank = (augmented == 0).all(dim=1)
    assert augmented.shape == images.shape
    assert (blank.sum(dim=(1, 2)) >= 64).all() and (blank.sum(dim=(1, 2)) < 256).all()  # the square at least
    assert augmented.std(dim=0).max() > 0.05
    augmented.sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0


@pytest.fixture
def adversary():
    torch.manual_seed(0)
    accelerator = Accelerator()
    discriminator = PatchDiscriminator(1, 8, 2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    discriminator, optimizer = accelerator.prepare(discriminator, optimizer)
    settings = LossConfig(adaptive_weight_cap=1e4)
    return AdversarialTraining(accelerator, discriminator, optimizer, settings, weight=0.5)


def test_weight_has_a_start_and_a_ramp(adversary):
    assert adversary.weight_at(0) == 0.5
    adversary.settings = LossConfig(adversarial_start=10, adversarial_ramp_steps=5)
    assert [adversary.weight_at(step) for step in (9, 10, 12, 14, 100)] == [0, 0.1, pytest.approx(0.3), 0.5, 0.5]


def test_adaptive_weight_is_the_ratio_of_the_gradients(adversary):
    last = torch.nn.Conv2d(4, 1, 3, padding=1)
    hidden, target = torch.randn(2, 4, 16, 16), torch.randn(2, 1, 16, 16)
    reconstruction = last(hidden)
    other = (reconstruction - target).abs().mean()
    term, logs = adversary.generator_term(reconstruction, other, last.weight, step=0)
    adversarial = -adversary.discriminator(last(hidden)).mean()
    norms = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (other, adversarial)]
    assert_close(logs["adaptive_weight"], norms[0] / (norms[1] + 1e-6))
    assert_close(term, 0.5 * norms[0] / (norms[1] + 1e-6) * adversarial)
    term.backward()
    assert last.weight.grad is not None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adversary.parameters)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**40])  # the second overflows, and is lowered
def test_adaptive_weight_in_float16_is_that_of_float32(scale):
    torch.manual_seed(0)
    last, pixels = torch.nn.Conv2d(4, 1, 3, padding=1), torch.randn(2, 4, 128, 128)

    def weight(dtype: torch.dtype, scale: float) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            reconstruction = last(pixels)
            loss = (reconstruction + 1).square().float().mean()
        near = reconstruction.detach().float() + 1e-4 * pixels[:, :1]  # what it nearly equals: tiny gradients
        return adaptive_weight((reconstruction.float() - near).square().mean(), loss, last.weight, cap=9, scale=scale)

    exact = weight(torch.float32, 1.0)
    assert weight(torch.float16, 1.0) == 0
    assert_close(weight(torch.float16, scale), exact, rtol=0.02, atol=0)


def test_discriminator_learns_to_tell_noise_from_stripes(adversary):
    rows = torch.arange(16).view(1, 1, 16, 1)
    accuracies = []
    for step in range(30):
        stripes = torch.sin(rows + torch.rand(8, 1, 1, 1) * 6).expand(8, 1, 16, 16)
        values = adversary.train_discriminator(stripes, torch.randn(8, 1, 16, 16), step)
        accuracies.append(values["discriminator_accuracy"].item())
    assert accuracies[-1] > 0.9 > accuracies[0]


def test_discriminator_tells_images_from_slightly_blurred_ones(adversary):
    assert not adversary.augments  # which would hide them
    generator = torch.Generator().manual_seed(0)
    accuracies = []
    for step in range(80):
        images = torch.randn(8, 1, 16, 16, generator=generator) / 2
        blurred = 0.8 * images + 0.2 * torch.nn.functional.avg_pool2d(images, 3, 1, 1)
        accuracies.append(adversary.train_discriminator(images, blurred, step)["discriminator_accuracy"].item())
    assert sum(accuracies[-10:]) / 10 > 0.7


@pytest.mark.parametrize(("accuracy", "reason"), [(0.999, "has won"), (0.55, "cannot discriminate")])
def test_a_discriminator_that_teaches_nothing_is_reported_once(adversary, caplog, accuracy, reason):
    means = {"train/discriminator_accuracy": accuracy, "train/logits_real": 3.0, "train/logits_fake": -3.0}
    adversary.warn_if_unbalanced({**means, "train/discriminator_accuracy": 0.7}, 1000)
    adversary.warn_if_unbalanced(means, 50)  # it has learnt for a moment only
    assert not caplog.records
    adversary.warn_if_unbalanced(means, 1000)
    adversary.warn_if_unbalanced(means, 2000)
    assert len(caplog.records) == 1 and reason in caplog.text
