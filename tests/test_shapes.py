"""Images that are no squares, from files to a pipeline."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from models import save_backbone
from PIL import Image
from scripts import TINY_DAE, TINY_DIT, TINY_PRIOR, log_of, resume, run, weights

from dae_diffusers import DAEDiTPipeline, DAEVQGANPipeline
from dae_diffusers.data import DataConfig, load_images, resize_and_crop
from dae_diffusers.data.arrays import resize_and_crop_array
from dae_diffusers.errors import ConfigError
from dae_diffusers.settings import compose, flags_of
from dae_diffusers.training import cache_latents, evaluate, preview, train_dae, train_dit, train_vqgan_prior
from dae_diffusers.training.settings import TrainDAEConfig

DAE = TINY_DAE.replace("--resolution 16", "--resolution 24 16")


@pytest.fixture(scope="module")
def upright(tmp_path_factory):
    """24 pictures of people's proportions, in two class folders."""
    root, random = tmp_path_factory.mktemp("upright"), np.random.default_rng(0)
    for number in range(24):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        size = (int(random.integers(30, 50)), int(random.integers(18, 30)), 3)
        Image.fromarray(random.integers(0, 256, size).astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, upright):
    """An autoencoder with all that looks at the shape of images in stage 1, a cache, and a transformer on it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("shapes")
    flags = DAE + " --equivariance 0.5 --random_flip"
    run(train_dae, flags, train_data_dir=upright, output_dir=folder)
    run(cache_latents, "", train_data_dir=upright, vae=folder / "vae", output_dir=folder / "latents")
    run(train_dit, TINY_DIT, vae=folder / "vae", latent_cache=folder / "latents", output_dir=folder)
    return folder


def test_shape_goes_from_the_flag_to_the_pipeline(trained):
    vae = AutoencoderKL.from_pretrained(trained / "vae")
    assert list(vae.config.sample_size) == [24, 16]
    pipeline = DAEDiTPipeline.from_pretrained(trained / "pipeline")
    assert list(pipeline.transformer.config.sample_size) == [12, 8]
    images = pipeline([0, 1], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 24, 16)
    with Image.open(sorted((trained / "train_dit" / "grids").iterdir())[-1]) as grid:
        assert grid.height != grid.width


def test_run_of_another_shape_resumes_exactly(trained, upright, tmp_path):
    more = {"vae": trained / "vae", "latent_cache": trained / "latents"}
    resume(train_dit, TINY_DIT, trained, tmp_path / "again", 3, ("pipeline",), **more)
    for name, tensor in weights(trained / "pipeline" / "transformer").items():
        assert torch.equal(tensor, weights(tmp_path / "again" / "pipeline" / "transformer")[name])
    assert log_of(tmp_path / "again", "train_dit") == log_of(trained, "train_dit")


@pytest.mark.filterwarnings("ignore:11 images for")
def test_it_is_measured_without_saying_its_shape_again(trained, upright, tmp_path):
    judge = save_backbone(tmp_path / "judge", "classifier")
    flags = "--num_images 12 --validation_fraction 0.45 --num_inference_steps 2 --batch_size 8"
    options = {"train_data_dir": upright, "pipeline": trained / "pipeline", "features": judge}
    run(evaluate, flags, output_dir=tmp_path / "measured", **options)
    metrics = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert np.isfinite(metrics["reconstruction"]["psnr"])


def test_codes_of_another_shape(upright, tmp_path):
    run(
        train_dae,
        DAE + " --autoencoder vq --codebook_size 12 --codebook_warmup_steps 1",
        train_data_dir=upright,
        output_dir=tmp_path,
    )
    run(train_vqgan_prior, TINY_PRIOR, train_data_dir=upright, vae=tmp_path / "vae", output_dir=tmp_path)
    pipeline = DAEVQGANPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.prior.config.grid_size == [12, 8]
    assert pipeline(0, output_type="pt").images.shape == (1, 3, 24, 16)


def test_preview_shows_what_the_crop_keeps(upright, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    preview.main(
        compose(preview.PreviewConfig, train_data_dir=str(upright), resolution=[48, 16], output_dir=str(tmp_path))
    )
    table = (tmp_path / "preview.md").read_text()
    assert "are smaller than 48x16 pixels" in table and "The crop keeps" in table


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (80, 8)])
def test_pictures_and_arrays_keep_their_middle(size):
    """A ramp along each side: what is left is centred, and scaled alike in both directions."""
    ramp = np.linspace(50, 200, 90)[:, None] + np.linspace(-40, 40, 70)
    picture = np.asarray(resize_and_crop(Image.fromarray(ramp.astype(np.uint8)), size)).astype(float)
    array = resize_and_crop_array(ramp.astype(np.float32)[..., None], size)[..., 0]
    assert picture.shape == array.shape == size
    np.testing.assert_allclose(picture, array, atol=2.5)
    assert array.mean() == pytest.approx(125, abs=3)  # half a pixel at most
    scale = max(size[0] / 90, size[1] / 70)
    down, across = (
        array[size[0] // 2 + 1, size[1] // 2] - array[size[0] // 2, size[1] // 2],
        np.diff(array[size[0] // 2]).mean(),
    )
    assert down == pytest.approx(150 / 89 / scale, rel=0.1) and across == pytest.approx(80 / 69 / scale, rel=0.1)


def test_arrays_of_the_right_shape_are_not_touched(tmp_path):
    """Spectrograms, say: one channel, no picture."""
    values = np.random.default_rng(0).normal(size=(6, 10, 24)).astype(np.float32)
    for number, array in enumerate(values):
        np.save(tmp_path / f"{number}.npy", array)
    config = DataConfig(train_data_dir=str(tmp_path), resolution=[10, 24], image_channels=1, value_range=[-5, 5])
    train, validation = load_images(config)
    found = torch.cat(
        [each["pixel_values"] for part in (train, validation) for each in map(part.__getitem__, range(len(part)))]
    )
    torch.testing.assert_close(found.sort(0).values, (torch.from_numpy(values) / 5).sort(0).values)


def test_square_has_one_name():
    assert DataConfig(resolution=[32, 32]).resolution == DataConfig(resolution=[32]).resolution == 32
    assert DataConfig(resolution=(32, 48)).size == (32, 48) and DataConfig(resolution=32).size == (32, 32)
    config = compose(TrainDAEConfig, dataset_name="digits", resolution=[64, 96])
    assert "--resolution 64 96" in " ".join(flags_of(config))


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        ([8, 8, 8], "`resolution` is \\[8, 8, 8\\], but must be one side, or height and width"),
        ([32, 30], "`resolution` 30 is not divisible by 4.* 28 and 32"),
        ([0, 16], "`resolution` is 0, but must be in"),
    ],
)
def test_shapes_that_do_not_work(resolution, message):
    with pytest.raises(ConfigError, match=message):
        compose(TrainDAEConfig, dataset_name="digits", resolution=resolution)
