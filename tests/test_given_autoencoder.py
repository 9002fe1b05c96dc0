"""What a trained autoencoder, pipeline or cache knows of the images needs no flag; a flag that says otherwise is answered."""

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from models import make_autoencoder, save_autoencoder

from dae_diffusers.autoencoders.building import make_autoencoder as build
from dae_diffusers.autoencoders.loading import load_autoencoder, settle_images
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.held_out import warn_of_seen_images
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.cache import CachedLatents, CacheIdentity, follow_cache
from dae_diffusers.metrics.sampling import ids_in_pipeline
from dae_diffusers.settings import compose
from dae_diffusers.training.settings import SCRIPTS, TrainDAEConfig, TrainDiTConfig

WITH_VAE = ("cache-latents", "complexity", "evaluate", "train-dit", "train-vqgan-prior")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("trained"))  # for 16 pixels


@pytest.mark.parametrize("script", WITH_VAE)
def test_side_and_channels_come_from_the_autoencoder(script, vae, caplog):
    caplog.set_level(logging.INFO)
    config = compose(SCRIPTS[script], vae=str(vae), dataset_name="digits")
    settle_images(config, load_autoencoder(str(vae)))
    assert (config.data.resolution, config.data.image_channels) == (16, 3)
    assert "16x16 pixels" in caplog.text and "--resolution" not in caplog.text

    caplog.clear()
    config = compose(SCRIPTS[script], vae=str(vae), dataset_name="digits", resolution=8)
    settle_images(config, load_autoencoder(str(vae)))
    assert config.data.resolution == 8
    assert "`--resolution` is 8x8, but the trained model knows images of 16x16 pixels" in caplog.text


def test_a_generator_decides_on_the_side_of_its_images(vae):
    config = compose(SCRIPTS["evaluate"], vae=str(vae), dataset_name="digits")
    settle_images(config, load_autoencoder(str(vae)), side=(8, 8))
    assert config.data.resolution == 8


@pytest.mark.parametrize("kind", ["stage1_dir", "pretrained_model_name_or_path"])
def test_later_stages_have_the_side_of_stage_1_and_record_another(kind, tmp_path):
    model = make_autoencoder("dropout" if kind == "stage1_dir" else "none")
    (model if kind == "stage1_dir" else model.to_diffusers()).save_pretrained(tmp_path)
    for given, side in ({}, 16), ({"resolution": 8}, 8):
        config = compose(TrainDAEConfig, dataset_name="digits", stage="2", **{kind: str(tmp_path)}, **given)
        built = build(config)
        assert config.data.resolution == built.to_diffusers().config.sample_size == side


def test_sizes_that_a_given_autoencoder_does_not_have_are_named(tmp_path, caplog):
    make_autoencoder().save_pretrained(tmp_path)
    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 5, "decoder_layers_per_block": 0}
    build(compose(TrainDAEConfig, dataset_name="digits", stage="2", stage1_dir=str(tmp_path), **sizes))
    assert "`--latent_channels` has no effect: the given autoencoder has 3." in caplog.text
    assert caplog.text.count("has no effect") == 1


def test_new_autoencoder_has_the_defaults():
    data = compose(TrainDAEConfig, dataset_name="digits").data
    assert (data.resolution, data.image_channels) == (32, 3)


def test_checks_of_the_side_wait_for_the_autoencoder(tmp_path):
    make_autoencoder().save_pretrained(tmp_path)
    config = compose(TrainDAEConfig, dataset_name="digits", stage="2", stage1_dir=str(tmp_path), adversarial_weight=1.0)
    with pytest.raises(ConfigError, match="at least 24 pixels; `resolution` is 16"):
        build(config)


def cache_of(**more) -> CachedLatents:
    cache = object.__new__(CachedLatents)
    cache.folder = Path("latents/train")
    identity = {"data": "", "autoencoder": "", "num_samples": 9, "resolution": 64, "image_channels": 1, "flips": True}
    cache.identity = CacheIdentity(**identity, dtype="float32", **more)
    return cache


def test_a_cache_brings_its_images_and_flags_without_effect_are_named(caplog):
    data = compose(TrainDiTConfig, vae="x", latent_cache="latents").data
    follow_cache(data, cache_of())
    assert (data.resolution, data.image_channels, data.random_flip) == (64, 1, True)
    assert caplog.text == ""
    data = compose(TrainDiTConfig, vae="x", latent_cache="latents", resolution=32, label_column="none").data
    follow_cache(data, cache_of())
    assert data.resolution == 64
    assert "`--label_column`, `--resolution` have no effect" in caplog.text
    beside = compose(TrainDiTConfig, vae="x", latent_cache="latents", dataset_name="digits", resolution=32).data
    follow_cache(beside, cache_of())
    assert beside.resolution == 32  # the images are there: the cache is compared with them


def test_images_that_training_has_seen_are_not_held_out_unsaid(image_folder, tmp_path, caplog):
    (tmp_path / "train_dae").mkdir()
    settings = {"train_data_dir": str(image_folder), "seed": 3, "validation_fraction": 0.3, "train_split": "train"}
    (tmp_path / "train_dae" / "config.yaml").write_text(yaml.safe_dump(settings))
    config = DataConfig(train_data_dir=str(image_folder), resolution=16)
    load_images(config, model=str(tmp_path / "vae"))
    assert "trained with `--validation_fraction 0.3`: other images were held out" in caplog.text
    caplog.clear()
    load_images(replace(config, validation_fraction=0.3), model=str(tmp_path / "vae"))
    warn_of_seen_images(DataConfig(dataset_name="digits"), str(tmp_path))
    warn_of_seen_images(config, "user/model")
    assert caplog.text == ""


@pytest.mark.parametrize("given", [{}, {"max_train_samples": 5}, {"on_bad_image": "skip"}])
def test_images_that_were_added_since_are_said(given, image_folder, tmp_path, caplog):
    (tmp_path / "train_dae").mkdir()
    settings = {"train_data_dir": str(image_folder), "seed": 0, "validation_fraction": 0.05, **given}
    (tmp_path / "train_dae" / "config.yaml").write_text(yaml.safe_dump(settings))
    config = DataConfig(train_data_dir=str(image_folder), resolution=16)
    num_images = len(load_images(config)[0])
    for before in (num_images, num_images - 1):
        (tmp_path / "train_dae" / "run.json").write_text(json.dumps({"counts": {"training_images": before}}))
        load_images(config, model=str(tmp_path / "vae"))
        is_said = before != num_images and not given
        assert (f"with {before} images, now there are {num_images}: " in caplog.text) == is_said
    assert ("about 95 % of those were trained on" in caplog.text) == (not given)


def test_another_range_of_values_than_the_autoencoders_is_said(image_folder, caplog):
    config = DataConfig(train_data_dir=str(image_folder), resolution=16, value_range=[0.0, 255.0])
    load_images(config, value_range=[0.0, 4095.0])
    assert "`--value_range` is 0 255, but the autoencoder was trained with 0 4095" in caplog.text


def test_next_command_names_the_images_and_leaves_out_what_the_model_knows():
    run = object.__new__(TrainingRun)
    flags = {"train_data_dir": "/my photos/cats", "resolution": 64, "image_channels": 1, "random_flip": True}
    run.config, run.output_dir = compose(TrainDAEConfig, **flags, seed=3), Path("runs/mine")
    words = shlex.split(run.next_command("train_dit", vae="vae"))
    config = parse_config(TrainDiTConfig, words[words.index("dae_diffusers.training.train_dit") + 1 :])
    assert config.transformer.vae == "runs/mine/vae" and config.run.output_dir == "runs/mine" and config.run.seed == 3
    assert config.data.train_data_dir == "/my photos/cats" and config.data.random_flip
    assert config.data.resolution is config.data.image_channels is None


class Named:
    def __init__(self, names, labels=None):
        self.id2label, self.labels = dict(enumerate(names)), labels


def test_classes_are_those_of_the_pipeline_by_name():
    images = Named(["ant", "bee"], [0, 1, 1])
    assert ids_in_pipeline(Named(["bee", "cat", "ant"]), images) == [2, 0, 0]
    assert ids_in_pipeline(Named(["0", "1"]), images) == [0, 1, 1]


def test_images_that_the_autoencoder_cannot_take_are_refused(vae):
    config = compose(SCRIPTS["evaluate"], vae=str(vae), dataset_name="digits", image_channels=1)
    with pytest.raises(UserError, match="takes 3 image channels, but `image_channels` is 1"):
        settle_images(config, load_autoencoder(str(vae)))
