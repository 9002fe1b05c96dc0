"""Every autoencoder of images that diffusers has serves as `--vae`: from the cache to a drawn image."""

import json

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderRAE,
    AutoencoderTiny,
)
from models import TINY_AUTOENCODER, save_backbone
from models import make_autoencoder as tiny_autoencoder
from safetensors.torch import load_file
from scripts import BARE_DAE, BARE_DIT, assert_same_weights, run
from torch.testing import assert_close

from dae_diffusers import DAEDiTImg2ImgPipeline, DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.autoencoders.building import make_autoencoder
from dae_diffusers.autoencoders.loading import decode_latents, encode_moments, load_autoencoder, settle_images
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import UserError
from dae_diffusers.fitting.decoder_fit import load_generator
from dae_diffusers.hub.card import make_card
from dae_diffusers.hub.results import read_result
from dae_diffusers.latents.statistics import LatentStatistics, normalize_latents
from dae_diffusers.settings import compose
from dae_diffusers.training import cache_latents, evaluate, train_dae, train_dit
from dae_diffusers.training.settings import TrainDAEConfig, TrainDiTConfig
from dae_diffusers.weights import STATISTICS, weights_fingerprint_of

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

RAE = {
    "encoder_type": "mae",
    "encoder_hidden_size": 64,  # one head
    "encoder_patch_size": 4,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "patch_size": 4,
    "encoder_input_size": 16,
}


def make_dc():
    levels = {"block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,))}
    blocks = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock")}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {**levels, **blocks}.items()}
    norms = ("batch_norm", "batch_norm", "rms_norm")  # as published ones have
    return AutoencoderDC(latent_channels=8, attention_head_dim=4, decoder_norm_types=norms, **sides)


def make_tiny():
    widths, blocks = (8, 8, 8), (1, 1, 1)
    sides = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    return AutoencoderTiny(**sides, num_encoder_blocks=blocks, num_decoder_blocks=blocks)


def make_asymmetric():
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 16),
        norm_num_groups=4,
        sample_size=16,
    )


def make_like_flux():
    config = {**TINY_AUTOENCODER, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**config, scaling_factor=0.3611, shift_factor=0.1159)


def make_with_a_scale():
    """Statistics that scale latents to a deviation of 0.5, as Playground 2.5 has them; and not those of these images."""
    statistics = {"latents_mean": [0.5] * 4, "latents_std": [3.0] * 4}
    return AutoencoderKL(**{**TINY_AUTOENCODER, "latent_channels": 4}, scaling_factor=0.5, **statistics)


def make_rae_with_statistics():
    random = torch.Generator().manual_seed(0)
    mean, std = torch.randn(64, 4, 4, generator=random), torch.rand(64, 4, 4, generator=random) + 0.5
    return AutoencoderRAE(**RAE, latents_mean=mean, latents_std=std, scaling_factor=2.0)


KINDS = {
    "AutoencoderDC": (make_dc, 8, 4),  # channels of its latents, factor
    "AutoencoderTiny": (make_tiny, 4, 4),
    "AsymmetricAutoencoderKL": (make_asymmetric, 4, 2),
    "AutoencoderKL like Flux": (make_like_flux, 16, 2),
    "AutoencoderKL with a scale": (make_with_a_scale, 4, 2),
    "AutoencoderRAE": (lambda: AutoencoderRAE(**RAE), 64, 4),
    "AutoencoderRAE with statistics": (make_rae_with_statistics, 64, 4),
}

TUNED_KINDS = ["AutoencoderDC", "AutoencoderTiny", "AsymmetricAutoencoderKL"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def trained(kind, tmp_path_factory, image_folder):
    """A few steps of training on cached latents of one of them."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    KINDS[kind][0]().save_pretrained(folder / "given")
    images = {"train_data_dir": image_folder, "resolution": 16, "vae": folder / "given"}
    run(cache_latents, "--batch_size 8 --dtype float32", **images, output_dir=folder / "latents")
    run(train_dit, BARE_DIT, **images, latent_cache=folder / "latents", output_dir=folder / "run")
    return folder


def latents_of(vae) -> torch.Tensor:
    """Normalised latents of some images."""
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        return normalize_latents(encode_moments(vae, pixels)[0], vae)


def test_it_goes_from_the_cache_to_an_image(kind, trained):
    _, channels, factor = KINDS[kind]
    pipe = DAEDiTPipeline.from_pretrained(trained / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vae).__name__ == kind.split()[0]
    assert (pipe.vae_scale_factor, pipe.transformer.config.in_channels) == (factor, channels)
    assert pipe("cat", num_inference_steps=1).images[0].size == (16, 16)
    pipe.save_pretrained(trained / "again")
    again = DAEDiTPipeline.from_pretrained(trained / "again")
    assert torch.equal(latents_of(again.vae), latents_of(pipe.vae))


def test_latents_are_normal_and_the_pipeline_undoes_it(kind, trained):
    pipe = DAEDiTImg2ImgPipeline.from_pretrained(trained / "run" / "pipeline")
    latents = latents_of(pipe.vae)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_close(pipe.encode_pixels(pixels), latents, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        expected = decode_latents(pipe.vae, encode_moments(pipe.vae, 2 * pixels - 1)[0])
    assert_close(pipe.decode_latents(latents), expected, atol=1e-4, rtol=1e-4)
    if "with statistics" not in kind:
        (path,) = (trained / "latents" / "train").glob("*.safetensors")
        mean, std = (load_file(path)[name].flatten(0, 1) for name in ("latents_mean", "latents_std"))
        ones, zeros = (normalize_latents(torch.full_like(mean, value), pipe.vae) for value in (1.0, 0.0))
        statistics = LatentStatistics.empty(latents.shape[1])
        statistics.add(normalize_latents(mean, pipe.vae), std * (ones - zeros))
        assert_close(statistics.mean, torch.zeros(latents.shape[1]).double(), atol=1e-3, rtol=0)
        assert_close(statistics.std, torch.ones(latents.shape[1]).double(), atol=1e-3, rtol=0)


def test_its_statistics_are_measured_once(trained, image_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_dit, "write_latent_statistics", None)
        more = {"vae": trained / "given", "latent_cache": trained / "latents", "resume_from_checkpoint": "latest"}
        run(train_dit, BARE_DIT, train_data_dir=image_folder, resolution=16, output_dir=trained / "run", **more)


def test_its_card_tells_its_class_and_latents(kind, trained):
    _, channels, factor = KINDS[kind]
    card = str(make_card(read_result(trained / "run"), "user/model"))
    assert f"from diffusers import {kind.split()[0]}" in card
    assert f"An image of 16x16x3 becomes {16 // factor}x{16 // factor}x{channels} latents" in card


def test_a_decoder_that_cannot_be_trained_is_refused(kind, trained):
    options = {"train_data_dir": "x", "output_dir": str(trained / "other"), "resolution": 16}
    starts = {"pretrained_model_name_or_path": str(trained / "given"), "stage": "2"}
    fits = {"pipeline": str(trained / "run" / "pipeline"), "stage": "3"}
    for make, more in ((make_autoencoder, starts), (load_generator, fits)):
        config = compose(TrainDAEConfig, **options, **more)
        is_tuned = make is make_autoencoder and kind in TUNED_KINDS
        if kind.startswith("AutoencoderKL") or is_tuned:
            make(config)
            continue
        with pytest.raises(
            UserError, match=f"has a {kind.split()[0]}, but train_dae trains only AutoencoderKL and VQModel"
        ):
            make(config)


@pytest.mark.parametrize("kind", TUNED_KINDS)
def test_its_decoder_is_trained_on_and_its_class_stays(kind, image_folder, tmp_path):
    KINDS[kind][0]().save_pretrained(tmp_path / "given")
    more = {"pretrained_model_name_or_path": tmp_path / "given", "train_data_dir": image_folder}
    flags = f"{BARE_DAE} --stage 2 --stage2_steps 40 --learning_rate 3e-3 --lr_warmup_steps 0"
    run(train_dae, flags.replace("--checkpointing_steps 2", ""), output_dir=tmp_path / "run", **more)
    before, after = (load_autoencoder(str(tmp_path / folder)) for folder in ("given", "run"))
    assert type(after) is type(before) and type(after).__name__ == kind
    assert after.config.sample_size == 16
    for name in STATISTICS:  # the latents are the same, and so are those who know them
        assert after.config.get(name) == before.config.get(name)
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert {name.partition(".")[0] for name in changed} <= {"decoder", "post_quant_conv"} and len(changed) > 10
    assert not any("condition_encoder" in name or name.endswith(("running_mean", "running_var")) for name in changed)
    pixels = torch.stack(
        [
            load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))[0][n]["pixel_values"]
            for n in range(8)
        ]
    )
    with torch.no_grad():
        errors = [
            (decode_latents(vae, encode_moments(vae, pixels)[0]) - pixels).abs().mean() for vae in (before, after)
        ]
    assert errors[1] < 0.9 * errors[0]
    assert f"from diffusers import {kind}" in str(make_card(read_result(tmp_path / "run"), "user/model"))


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("AutoencoderTiny", {}, "only the decoder can be trained: give `stage 2`"),
        ("AutoencoderTiny", {"stage": "2", "decoder": "tiny"}, "keeps its size"),
        ("AutoencoderTiny", {"stage": "2", "decoder_layers_per_block": 0}, "keeps its size"),
        *((kind, {"stage": "2", "gradient_checkpointing": True}, "leave it out") for kind in TUNED_KINDS[::2]),
    ],
)
def test_what_such_a_class_does_not_do_is_one_line(kind, more, message, tmp_path):
    KINDS[kind][0]().save_pretrained(tmp_path)
    config = compose(
        TrainDAEConfig, train_data_dir="x", pretrained_model_name_or_path=str(tmp_path), resolution=16, **more
    )
    with pytest.raises(UserError, match=message):
        make_autoencoder(config)


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AsymmetricAutoencoderKL", "AutoencoderRAE with statistics"])
def test_it_is_measured(kind, image_folder, tmp_path):
    KINDS[kind][0]().save_pretrained(tmp_path / "vae")
    features = save_backbone(tmp_path / "features", "classifier")
    options = {"train_data_dir": image_folder, "resolution": 16, "vae": tmp_path / "vae", "features": features}
    run(evaluate, "--validation_fraction 0.5", **options, output_dir=tmp_path / "measured")
    measured = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert measured["reconstruction"]["psnr"] > 0
    assert measured["setting"]["weights"] == {"vae": weights_fingerprint_of(tmp_path / "vae")}
    assert (measured["latent_space"]["kl"] is not None) == ("KL" in kind)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    DAEDiTTransformer2DModel(8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its class is DAEDiTTransformer2DModel") as error:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_size_of_the_images_is_that_of_a_representation_autoencoder(tmp_path):
    AutoencoderRAE(**RAE).save_pretrained(tmp_path)
    vae = load_autoencoder(str(tmp_path))
    config = compose(TrainDiTConfig, vae=str(tmp_path), dataset_name="digits")
    settle_images(config, vae)
    assert config.data.resolution == 16
    with pytest.raises(
        UserError, match="`resolution` is 32x32, but this AutoencoderRAE makes images of 16x16 pixels only"
    ):
        settle_images(compose(TrainDiTConfig, vae=str(tmp_path), dataset_name="digits", resolution=32), vae)


def test_half_precision_weights_alone_are_enough(tmp_path):
    vae = tiny_autoencoder("none").to_diffusers()
    vae.half().save_pretrained(tmp_path / "vae", variant="fp16")
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").stat()
    for place in (tmp_path, tmp_path / "vae"):
        found = load_autoencoder(str(place))
        assert found.dtype == torch.float32
        assert_same_weights(found.state_dict(), vae.float().state_dict())
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(UserError, match="no file named diffusion_pytorch_model"):
        load_autoencoder(str(tmp_path / "vae"))


def test_single_files_are_read_by_diffusers(tmp_path, monkeypatch):
    vae = tiny_autoencoder("none").to_diffusers()
    vae.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=f"one file of an autoencoder. Give its folder, {tmp_path / 'vae'}"):
        load_autoencoder(str(weights))
    alone = tmp_path / "sd.safetensors"
    weights.rename(alone)
    with pytest.raises(UserError, match="sd.safetensors is not a file with the weights of Stable Diffusion"):
        load_autoencoder(str(alone))  # its config is not to be had here
    monkeypatch.setattr(AutoencoderKL, "from_single_file", lambda path, torch_dtype: vae.to(torch_dtype))
    found = load_autoencoder(str(alone))
    assert found is vae and not found.training and not any(each.requires_grad for each in found.parameters())
