"""Laws of the decoupled autoencoder: each stage changes its own half, bit for bit, and nothing else."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from models import make_autoencoder
from scripts import assert_same_weights

from dae_diffusers import DAEAutoencoderKL
from dae_diffusers.autoencoders.weak_decoders import keep_prefixes
from dae_diffusers.losses.autoencoder import kl_loss

LATENT_HALF = ("encoder", "quant_conv")
DECODER_HALF = ("post_quant_conv", "decoder")


def train_two_steps(model, pixel_values):
    """Two optimiser steps of the current stage, with weight decay so that any trainable weight moves."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        reconstruction, posterior = model(pixel_values, sample_posterior=True, return_dict=False)
        loss = (reconstruction - pixel_values).abs().mean() + (kl_loss(posterior) if model.stage == 1 else 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def changed_children(model, before):
    after = model.state_dict()
    return {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("kind", ["same", "narrow", "shallow", "dropout", "prefix", "linear"])
def test_stage_one_changes_latent_half_and_auxiliary_decoder_only(kind, pixel_values):
    model = make_autoencoder(kind)
    model.set_stage(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_two_steps(model, pixel_values)
    assert changed_children(model, before) == {*LATENT_HALF, "auxiliary_decoder"}


@pytest.mark.parametrize("kind", ["none", "dropout"])
def test_stage_two_changes_decoder_half_only(kind, pixel_values):
    model = make_autoencoder(kind)
    model.set_stage(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_two_steps(model, pixel_values)
    assert changed_children(model, before) == set(DECODER_HALF)


def test_joint_training_changes_everything(pixel_values):
    model = make_autoencoder("none")
    model.set_stage(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_two_steps(model, pixel_values)
    assert changed_children(model, before) == {*LATENT_HALF, *DECODER_HALF}


@pytest.mark.parametrize("kind", ["none", "same", "dropout"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_trainable_parameter_gets_a_gradient(kind, stage, pixel_values):
    model = make_autoencoder(kind).train()
    model.set_stage(stage)
    reconstruction, posterior = model(pixel_values, sample_posterior=True, return_dict=False)
    (reconstruction.square().mean() + kl_loss(posterior) * (stage == 1)).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


def test_frozen_half_stays_in_eval_mode_under_train(autoencoder):
    autoencoder.set_stage(2)
    autoencoder.train()
    assert not any(module.training for module in autoencoder.encoder.modules())
    assert not autoencoder.quant_conv.training
    assert all(module.training for module in autoencoder.decoder.modules())
    autoencoder.set_stage(1)
    assert all(module.training for module in autoencoder.encoder.modules())


def test_posterior_of_stage_two_carries_no_gradient(autoencoder, pixel_values):
    autoencoder.set_stage(2)
    assert not autoencoder(pixel_values).posterior.mean.requires_grad


def test_stage_none_undoes_a_stage(autoencoder):
    autoencoder.set_stage(2)
    autoencoder.set_stage(None)
    assert all(parameter.requires_grad for parameter in autoencoder.parameters())


@pytest.mark.parametrize("kind", ["none", "dropout"])
def test_without_a_stage_it_is_its_parent(kind, pixel_values):
    model = make_autoencoder(kind).eval()
    model.register_to_config(latents_std=[1.0, 2.0, 3.0])  # set since, as statistics are
    parent = model.to_diffusers()
    assert parent.config.latents_std == [1.0, 2.0, 3.0]
    assert type(parent) is AutoencoderKL
    with torch.no_grad():
        assert torch.equal(model(pixel_values).sample, parent(pixel_values).sample)
        assert torch.equal(model(pixel_values, return_dict=False)[0], parent(pixel_values, return_dict=False)[0])
        seeded = [
            m(pixel_values, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample
            for m in (model, parent)
        ]
    assert torch.equal(*seeded)


def test_dropout_acts_in_training_only(autoencoder, pixel_values):
    autoencoder.set_stage(1)
    latents = torch.randn(2, 3, 8, 8)
    autoencoder.train()
    assert not torch.equal(autoencoder.decode_in_stage(latents), autoencoder.decode_in_stage(latents))
    autoencoder.eval()
    assert torch.equal(autoencoder.decode_in_stage(latents), autoencoder.decode_in_stage(latents))


def test_dropout_loses_whole_channels_of_each_residual_branch_at_its_rate():
    model = make_autoencoder("dropout", auxiliary_dropout=0.3).train()
    model.set_stage(1)
    seen = []
    blocks = [block for block in model.auxiliary_decoder.modules() if isinstance(block, ResnetBlock2D)]
    for block in blocks:
        block.conv2.register_forward_hook(lambda conv, inputs, output: seen.append(inputs[0]))
    torch.manual_seed(0)
    model.decode_in_stage(torch.randn(200, 3, 4, 4))
    lost = [(hidden == 0).float().mean(dim=(2, 3)) for hidden in seen]
    assert len(seen) == len(blocks) > 3
    assert all(set(each.unique().tolist()) == {0.0, 1.0} for each in lost)
    torch.testing.assert_close(
        torch.cat([each.flatten() for each in lost]).mean(), torch.tensor(0.3), atol=0.02, rtol=0
    )


def test_prefix_shows_the_first_channels_only_and_all_of_them_are_no_prefix():
    latents = torch.randn(300, 4, 2, 2)
    kept = keep_prefixes(latents)
    counts = (kept != 0).all(dim=(2, 3)).sum(dim=1)
    assert set(counts.tolist()) == {1, 2, 3, 4}
    for image, whole, count in zip(kept, latents, counts, strict=True):
        assert torch.equal(image[:count], whole[:count]) and not image[count:].any()
    assert torch.equal(keep_prefixes(latents, torch.full((300,), 4)), latents)


def test_prefix_acts_in_training_only_and_is_the_control_otherwise():
    models = [make_autoencoder(kind).train() for kind in ("prefix", "same")]
    latents = torch.randn(2, 3, 8, 8)
    for model in models:
        model.set_stage(1)
    assert not torch.equal(*(model.decode_in_stage(latents) for model in models))
    assert torch.equal(*(model.eval().decode_in_stage(latents) for model in models))
    assert models[0].can_start_warm


def test_dropout_of_zero_is_the_control_bit_for_bit_and_keeps_the_real_decoders_names():
    models = []
    for kind in ("dropout", "same"):
        torch.manual_seed(0)
        models.append(make_autoencoder(kind, auxiliary_dropout=0.0).train())
        models[-1].set_stage(1)
    latents = torch.randn(2, 3, 8, 8)
    assert torch.equal(*(model.decode_in_stage(latents) for model in models))
    assert_same_weights(*(model.state_dict() for model in models))
    names = list(models[0].auxiliary_decoder.decoder.state_dict())
    assert names == list(models[0].decoder.state_dict())


def test_same_is_as_strong_as_the_real_decoder_and_weak_ones_are_not():
    def size(module):
        return sum(p.numel() for p in module.parameters())

    model = make_autoencoder("same", layers_per_block=2)
    real = size(model.decoder) + size(model.post_quant_conv)
    assert size(model.auxiliary_decoder) == real
    for kind in ("narrow", "shallow", "linear"):
        assert size(make_autoencoder(kind, layers_per_block=2).auxiliary_decoder) < real
    assert size(make_autoencoder("dropout", layers_per_block=2).auxiliary_decoder) == real


@pytest.mark.parametrize("kind", ["same", "narrow", "shallow", "dropout", "prefix", "linear"])
def test_auxiliary_decoder_makes_images_of_the_right_size(kind):
    model = make_autoencoder(kind, block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
                             up_block_types=("UpDecoderBlock2D",) * 3)  # fmt: skip
    assert model.auxiliary_decoder(torch.randn(2, 3, 3, 5)).shape == (2, 3, 12, 20)


def test_real_decoder_can_start_from_the_auxiliary_one(autoencoder):
    latents = torch.randn(2, 3, 8, 8)
    autoencoder.eval().start_decoder_from_auxiliary()
    assert torch.equal(autoencoder.decode(latents).sample, autoencoder.auxiliary_decoder(latents))
    with pytest.raises(ValueError, match="can start only from"):
        make_autoencoder("narrow").start_decoder_from_auxiliary()


@pytest.mark.parametrize("kind", ["none", "narrow", "dropout"])
def test_save_and_load_keep_everything(kind, tmp_path, pixel_values):
    model = make_autoencoder(kind).eval()
    model.save_pretrained(tmp_path)
    loaded = DAEAutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config.auxiliary_decoder_type == kind
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_exported_model_loads_as_plain_diffusers_and_reconstructs_identically(autoencoder, tmp_path, pixel_values):
    autoencoder.eval().to_diffusers().save_pretrained(tmp_path)
    plain = AutoencoderKL.from_pretrained(tmp_path)
    assert not any(name.startswith("auxiliary") for name in [*plain.config, *plain.state_dict()])
    with torch.no_grad():
        assert torch.equal(plain(pixel_values).sample, autoencoder(pixel_values).sample)


def test_export_keeps_the_dtype(autoencoder):
    assert autoencoder.to(torch.float64).to_diffusers().dtype == torch.float64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"auxiliary_decoder_type": "weak"}, "must be one of"),
        ({"auxiliary_decoder_type": "dropout", "auxiliary_dropout": 1.0}, "below 1"),
        ({"auxiliary_decoder_type": "narrow", "auxiliary_channel_multiplier": 0.0}, "above 0"),
        ({"auxiliary_decoder_type": "shallow", "auxiliary_layers_per_block": -1}, "0 or more"),
        ({"auxiliary_decoder_type": "shallow", "auxiliary_layers_per_block": 1}, "below the `layers_per_block`"),
    ],
)
def test_bad_auxiliary_decoders_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DAEAutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **config)


def test_bad_stage_is_refused(autoencoder):
    with pytest.raises(ValueError, match="must be 1"):
        autoencoder.set_stage(4)
