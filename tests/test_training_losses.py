"""`train_dae.py` with perceptual and adversarial losses, regularisers and published autoencoders, as a user runs it."""

import json
import logging
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from models import make_autoencoder, save_backbone
from safetensors.torch import load_file
from scripts import TINY_DAE, assert_same_weights, launch, log_of, resume, run, succeed, weights

from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.losses.regularizers import SpatialTransform
from dae_diffusers.settings import compose
from dae_diffusers.training import train_dae
from dae_diffusers.training.settings import TrainDAEConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

ADVERSARIAL = (
    " --adversarial_weight 0.5 --discriminator_channels 8 --discriminator_layers 2 --discriminator_start 1 "
    "--adversarial_start 2 --adversarial_ramp_steps 2"
)


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"), "resnet")


@pytest.fixture(scope="module")
def flags(backbone_folder):
    return TINY_DAE + ADVERSARIAL + f" --perceptual_model {backbone_folder} --stage1_adversarial_weight 0.5"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder, flags):
    folder = tmp_path_factory.mktemp("run")
    run(train_dae, flags, train_data_dir=image_folder, output_dir=folder)
    return folder


def test_losses_begin_when_they_should_and_are_logged(trained):
    rows = {row["step"]: row for row in log_of(trained) if "train/reconstruction_loss" in row}
    for start in (0, 4):  # both stages
        assert "train/discriminator_loss" in rows[start + 2] and "train/adversarial_loss" not in rows[start + 2]
        assert {"train/adversarial_loss", "train/adaptive_weight", "train/logits_fake"} <= rows[start + 4].keys()
    assert all(0 < row["train/perceptual_loss"] < 4 for row in rows.values())
    validation = [row for row in log_of(trained) if "validation/psnr" in row]
    for row in validation:  # stage 2 leaves the latents as they are
        assert ({"latents/kl", "latents/high_frequency_share"} <= row.keys()) == (row["step"] <= 4)


@pytest.mark.parametrize("step", [3, 6])
def test_resume_restores_the_discriminator(trained, image_folder, flags, tmp_path, step):
    resume(train_dae, flags, trained, tmp_path / "run", step, ("vae",), train_data_dir=image_folder)
    assert_same_weights(weights(trained / "vae"), weights(tmp_path / "run" / "vae"))
    assert log_of(trained) == log_of(tmp_path / "run")


def test_two_processes_equal_one_that_accumulates(image_folder, tmp_path, flags):
    """Autoencoder and discriminator: both are averaged over processes, and both accumulate."""
    more = " --adaptive_weight_cap 0 --stage1_steps 3 --stage2_steps 3 --checkpointing_steps 3"
    succeed(
        launch("train_dae", flags + more + " --gradient_accumulation_steps 2", train_data_dir=image_folder,
               output_dir=tmp_path / "1")
    )  # fmt: skip
    succeed(launch("train_dae", flags + more, processes=2, train_data_dir=image_folder, output_dir=tmp_path / "2"))
    for step in (3, 6):
        for file in ("model.safetensors", "model_1.safetensors"):
            first, second = (
                load_file(tmp_path / name / "train_dae" / "checkpoints" / f"checkpoint-{step:08d}" / file)
                for name in "12"
            )
            assert_same_weights(first, second, rtol=2e-3, atol=2e-4)


def test_discriminator_on_a_backbone_in_bfloat16(image_folder, tmp_path, flags, backbone_folder):
    more = f" --discriminator_model {backbone_folder} --mixed_precision bf16 --adversarial_loss non_saturating"
    run(train_dae, flags + more, train_data_dir=image_folder, output_dir=tmp_path)
    assert all(map(torch.isfinite, (value.sum() for value in weights(tmp_path / "vae").values())))


def test_all_regularisers_at_once(image_folder, tmp_path):
    flags = TINY_DAE + " --mask_ratio 0.3 --latent_denoising 1 --equivariance 0.9 --noise_tau 0.3"
    backbone = save_backbone(tmp_path / "backbone", "resnet")  # of larger images: everything is resized
    kl = f" --mixed_precision bf16 --perceptual_model {backbone}"
    vq = " --autoencoder vq --codebook_size 16 --codebook_warmup_steps 1"
    for kind, more in (("kl", kl), ("vq", vq)):
        run(train_dae, flags + more, train_data_dir=image_folder, output_dir=tmp_path / kind)
        assert (tmp_path / kind / "vae" / "config.json").exists()


@pytest.mark.parametrize("stage", ["all", "2", "1"])
def test_training_starts_from_a_published_autoencoder(image_folder, tmp_path, stage):
    """And never from the auxiliary decoder, not even in a run of its own."""
    published = make_autoencoder("none", layers_per_block=2).to_diffusers()
    given = {"latents_mean": [0.5] * 3, "latents_std": [2.0] * 3} if stage == "2" else {}
    published.register_to_config(**given)
    published.save_pretrained(tmp_path / "published")
    flags = TINY_DAE + f" --stage {stage} --learning_rate 1e-9 --pretrained_model_name_or_path {tmp_path / 'published'}"
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path / "run")
    if stage == "1":
        flags = TINY_DAE + f" --stage 2 --learning_rate 1e-9 --stage1_dir {tmp_path / 'run'}"
        run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path / "2")
        (tmp_path / "2" / "vae").rename(tmp_path / "run" / "vae")
    config = json.loads((tmp_path / "run" / "vae" / "config.json").read_text())
    assert config["layers_per_block"] == 2
    if stage == "2":  # its latents are as they were, and generators know them by these numbers
        assert {name: config[name] for name in given} == given
        assert config["scaling_factor"] == published.config.scaling_factor != 1
    else:
        assert len(config["latents_mean"]) == 3 and config["scaling_factor"] == 1
    before, after = weights(tmp_path / "published"), weights(tmp_path / "run" / "vae")
    assert_same_weights(before, after, rtol=0, atol=1e-6)
    for name in before:
        if stage == "2" and name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(before[name], after[name])


def test_unfit_published_autoencoders_are_refused(image_folder, tmp_path):
    make_autoencoder("none", in_channels=1, out_channels=1).to_diffusers().save_pretrained(tmp_path / "gray")
    for path, sentence in ((tmp_path / "gray", "1"), (tmp_path / "nothing", "nothing")):
        with pytest.raises(UserError, match=sentence):
            run(
                train_dae,
                TINY_DAE + " --image_channels 3",
                pretrained_model_name_or_path=path,
                train_data_dir=image_folder,
                output_dir=tmp_path / "run",
            )
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"adversarial_weight": -1}, "`adversarial_weight` is -1"),
        ({"adversarial_weight": 1, "resolution": 16}, "at least 24 pixels"),
        ({"discriminator_start": 5, "adversarial_start": 4}, "has learnt nothing"),
        ({"discriminator_channels": 12}, "multiple of 8"),
        ({"perceptual_model": "x", "image_channels": 5}, "`perceptual_model` takes pictures"),
        ({"perceptual_model": "lpips", "resolution": 8}, "at least 16 pixels, but a side has 8"),
        (
            {"perceptual_model": "lpips", "equivariance": 0.1},
            "of 32 pixels to 8, but `perceptual_model lpips` needs 16",
        ),
        ({"mask_ratio": 1.0}, "below 1"),
        ({"equivariance": 2.0}, r"in \[0, 1\]"),
        ({"noise_tau": -0.1}, "0 or more"),
        (
            {"pretrained_model_name_or_path": "x", "autoencoder": "vq", "codebook_warmup_steps": 1},
            "makes its own codebook",
        ),
        ({"pretrained_model_name_or_path": "x", "stage1_dir": "y", "stage": "2"}, "not both"),
        (
            {"adversarial_weight": 1, "mixed_precision": "fp16", "gradient_accumulation_steps": 2, "resolution": 32},
            "loss scale",
        ),
    ],
)
def test_bad_flags_are_refused_with_a_sentence(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose(TrainDAEConfig, **{"dataset_name": "digits", "resolution": 32, **flags})


def test_fp16_that_accelerate_is_configured_to_is_refused_like_the_flag(monkeypatch):
    run = SimpleNamespace(accelerator=SimpleNamespace(mixed_precision="fp16"))
    monkeypatch.setattr(train_dae, "TrainingRun", lambda *args: run)
    with pytest.raises(ConfigError, match="loss scale"):
        train_dae.main(
            compose(
                TrainDAEConfig,
                dataset_name="digits",
                resolution=32,
                adversarial_weight=1,
                gradient_accumulation_steps=2,
            )
        )


def test_adversarial_loss_that_stage_one_does_not_have_goes_with_equivariance():
    only_stage2 = {"stage": "2", "stage1_dir": "x", "stage1_adversarial_weight": 1.0}
    compose(TrainDAEConfig, dataset_name="digits", resolution=32, equivariance=0.5, **only_stage2)
    compose(TrainDAEConfig, dataset_name="digits", resolution=32, equivariance=0.5, adversarial_weight=1.0)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_lpips_takes_the_smallest_image_that_equivariance_makes(factor, monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)
    lpips = {"pretrained_model_name_or_path": "x", "perceptual_model": "lpips", "equivariance": 0.5}
    for side in range(max(16, factor), 128, factor):
        config = compose(TrainDAEConfig, dataset_name="digits", resolution=side, **lpips)
        transform = SpatialTransform.draw((side // factor,) * 2, factor)
        small = min(transform.of_images(torch.zeros(1, 1, side, side)).shape[2:])
        with nullcontext() if small >= 16 else pytest.raises(ConfigError, match=f"of {side} pixels to {small},"):
            config.check_lpips(factor)


def test_equivariance_goes_with_lpips_of_another_stage():
    options = {"dataset_name": "digits", "resolution": 32, "perceptual_model": "lpips", "equivariance": 0.5}
    compose(TrainDAEConfig, **options, stage1_perceptual_weight=0.0)
    compose(TrainDAEConfig, **options, stage="2", stage1_dir="x").check_lpips(4)


@pytest.fixture(autouse=True)
def quiet_logs():
    yield
    logging.getLogger().setLevel(logging.WARNING)
