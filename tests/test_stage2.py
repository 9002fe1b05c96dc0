"""Stage 2 beside a generator, on the encoder of one stage 1, and with a decoder of another size than the encoder's mirror."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline, VQModel
from models import TINY_AUTOENCODER, make_autoencoder, make_vq_model
from safetensors.torch import load_file
from scripts import (
    CONFIG_CLASSES,
    PRIOR,
    TINY_DAE,
    TINY_DIT,
    TINY_PRIOR,
    TRANSFORMER,
    assert_same_weights,
    run,
    start,
    weights,
)
from torch.utils.flop_counter import FlopCounterMode

from dae_diffusers import DAEAsymmetricAutoencoderKL, DAEAsymmetricVQModel, DAEDiTPipeline, DAEVQGANPipeline
from dae_diffusers.autoencoders import building
from dae_diffusers.autoencoders.fewer_channels import first_latent_channels
from dae_diffusers.autoencoders.loading import encode_moments, load_autoencoder, spatial_factor
from dae_diffusers.autoencoders.settings import AutoencoderConfig
from dae_diffusers.autoencoders.weak_decoders import keep_prefixes
from dae_diffusers.cli import parse_config
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.fitting.side_by_side import NEWEST, WAITING, GrowingAutoencoder, join_waiting, save_newest
from dae_diffusers.hub.card import repository_files
from dae_diffusers.hub.results import read_result
from dae_diffusers.settings import compose
from dae_diffusers.training import assemble, train_dae, train_dit, train_vqgan_prior
from dae_diffusers.training.settings import AssembleConfig, TrainDAEConfig
from dae_diffusers.weights import latents_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

VQ = " --autoencoder vq --codebook_size 8 --codebook_warmup_steps 2"
KINDS = {
    "kl": ("", train_dit, TINY_DIT, DAEDiTPipeline, TRANSFORMER),
    "vq": (VQ, train_vqgan_prior, TINY_PRIOR, DAEVQGANPipeline, PRIOR),
}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
LARGER = " --decoder_block_out_channels 8 16 --decoder_layers_per_block 2"
CLASSES = {"kl": (DAEAsymmetricAutoencoderKL, AutoencoderKL), "vq": (DAEAsymmetricVQModel, VQModel)}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, image_folder) -> dict[str, Path]:
    """A finished stage 1 of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        run(train_dae, f"{TINY_DAE} --stage 1{KINDS[kind][0]}", train_data_dir=image_folder, output_dir=folder)
    return folders


@pytest.fixture(scope="module")
def generated(stage1, image_folder, tmp_path_factory) -> dict[str, Path]:
    """The same folders with a generator, which ended before stage 2."""
    folders = {}
    for kind, folder in stage1.items():
        folders[kind] = tmp_path_factory.mktemp("generated") / kind
        shutil.copytree(folder, folders[kind])
        flags = {"vae": folders[kind], "output_dir": folders[kind], "train_data_dir": image_folder}
        run(KINDS[kind][1], KINDS[kind][2], **flags)
    return folders


@pytest.fixture(scope="module")
def finished(generated, image_folder, tmp_path_factory) -> dict[str, Path]:
    """The same folders after stage 2, which went on where stage 1 had stopped."""
    folders = {}
    for kind, folder in generated.items():
        folders[kind] = tmp_path_factory.mktemp("finished") / kind
        shutil.copytree(folder, folders[kind])
        flags = {"train_data_dir": image_folder, "output_dir": folders[kind], "resume_from_checkpoint": "latest"}
        run(train_dae, TINY_DAE + KINDS[kind][0], **flags)
    return folders


@pytest.fixture(scope="module")
def larger(stage1, generated, image_folder, tmp_path_factory) -> dict[str, Path]:
    """A larger decoder on the encoder of the same stage 1, in a folder in which the generator waits for it."""
    folders = {}
    for kind, folder in generated.items():
        folders[kind] = tmp_path_factory.mktemp("larger") / kind
        shutil.copytree(folder / WAITING, folders[kind] / WAITING)
        flags = {"train_data_dir": image_folder, "output_dir": folders[kind], "stage1_dir": stage1[kind]}
        run(train_dae, f"{TINY_DAE} --stage 2{KINDS[kind][0]}{LARGER}", **flags)
    return folders


def waiting(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(folder / KINDS[kind][4].replace("pipeline", WAITING))


def check_pipeline(folder: Path, kind: str, generator: dict[str, torch.Tensor]) -> None:
    """That it is whole: the generator as it was, the decoder of `vae/`, and images by class name."""
    assert not (folder / WAITING).exists()
    assert_same_weights(load_file(folder / KINDS[kind][4]), generator)
    assert_same_weights(weights(folder / "pipeline" / "vae"), weights(folder / "vae"))
    pipeline = KINDS[kind][3].from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline("cat").images) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_stage_two_that_ends_last_makes_the_pipeline(kind, generated, finished):
    assert not (generated[kind] / "pipeline").exists()
    check_pipeline(finished[kind], kind, waiting(generated[kind], kind))
    assert not any("other weights" in doubt for doubt in read_result(finished[kind]).doubts)
    assert not (finished[kind] / "train_dae" / NEWEST).exists()


def test_generator_that_ends_last_makes_the_same_pipeline(generated, finished, image_folder, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(finished["kl"], folder, ignore=shutil.ignore_patterns("pipeline", "train_dit"))
    with caplog.at_level(logging.INFO):
        run(train_dit, TINY_DIT, vae=folder / "stage1", output_dir=folder, train_data_dir=image_folder)
    assert f"samples are decoded by {folder.resolve() / 'vae'}" in caplog.text
    check_pipeline(folder, "kl", waiting(generated["kl"], "kl"))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_stage_one_are_those_of_the_finished_autoencoder(kind, stage1, finished, larger, pixel_values):
    early = encode_moments(GrowingAutoencoder(str(stage1[kind]), Path(), torch.device("cpu")).vae, pixel_values)
    for folder in (finished[kind], larger[kind]):
        late = encode_moments(load_autoencoder(str(folder)), pixel_values)
        assert torch.equal(early[0], late[0]) and torch.equal(early[1], late[1])


def test_generator_goes_on_with_its_statistics_when_the_decoder_is_finished(
    generated, finished, image_folder, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished["kl"], folder, ignore=shutil.ignore_patterns("pipeline"))
    vae = load_autoencoder(str(folder / "vae"))
    vae.register_to_config(latents_mean=[1.0] * 3)
    vae.save_pretrained(folder / "vae")
    checkpoint = folder / "train_dit" / "checkpoints" / "checkpoint-00000003"
    flags = {"vae": folder, "train_data_dir": image_folder, "output_dir": folder}
    run(train_dit, TINY_DIT, resume_from_checkpoint=checkpoint, **flags)
    check_pipeline(folder, "kl", waiting(generated["kl"], "kl"))
    known = DAEDiTPipeline.from_pretrained(generated["kl"] / WAITING).vae.config.latents_mean
    assert DAEDiTPipeline.from_pretrained(folder / "pipeline").vae.config.latents_mean == known != [1.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_decoded_by_the_newest_decoder_of_this_encoder(kind, stage1, finished, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(stage1[kind], folder)
    growing = GrowingAutoencoder(str(folder), folder, torch.device("cpu"))
    model = growing._stage1
    latents = torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.INFO), torch.no_grad():
        torch.testing.assert_close(growing.newest().decode(latents).sample, auxiliary_image(model, latents))
        assert "samples are decoded by the auxiliary decoder of stage 1" in caplog.text
        save_newest(model, folder / "train_dae", 7)
        assert torch.equal(growing.newest().decode(latents).sample, growing.vae.decode(latents).sample)
        assert f"{NEWEST}, the decoder at step 7" in caplog.text
        shutil.copytree(finished[kind] / "vae", folder / "vae")
        expected = load_autoencoder(str(folder / "vae"))
        assert torch.equal(growing.newest().decode(latents).sample, expected.decode(latents).sample)
        of_another_encoder(folder / "vae").save_pretrained(folder / "vae")
        growing.newest()
        assert caplog.text.count("the decoder at step 7") == 2


def auxiliary_image(model, latents: torch.Tensor) -> torch.Tensor:
    model.set_stage(1)
    return model.eval().decode_in_stage(latents)


def of_another_encoder(folder: Path):
    vae = load_autoencoder(str(folder))
    for parameter in vae.encoder.parameters():
        parameter.data.add_(1)
    return vae


def test_decoder_of_another_encoder_is_refused(generated, finished, tmp_path, caplog):
    shutil.copytree(generated["kl"] / WAITING, tmp_path / WAITING)
    of_another_encoder(finished["kl"]).save_pretrained(tmp_path / "vae")
    arguments = ["--pipeline", str(tmp_path), "--vae"]
    with pytest.raises(UserError, match="was trained on another encoder"):
        assemble.main(parse_config(AssembleConfig, [*arguments, str(tmp_path / "vae")]))
    assert not join_waiting(tmp_path, [tmp_path]) and "stays as it is: the generator of" in caplog.text
    assert (tmp_path / WAITING).exists() and not (tmp_path / "pipeline").exists()
    elsewhere = ["--output_dir", str(tmp_path / "elsewhere")]
    assemble.main(parse_config(AssembleConfig, [*arguments, str(finished["kl"]), *elsewhere]))
    assert (tmp_path / "elsewhere" / "pipeline").exists() and (tmp_path / WAITING).exists()
    assemble.main(parse_config(AssembleConfig, [*arguments, str(finished["kl"])]))
    assert_same_weights(weights(tmp_path / "pipeline" / "vae"), weights(finished["kl"] / "vae"))
    assert not (tmp_path / WAITING).exists()
    with pytest.raises(UserError, match="holds no pipeline"):
        assemble.main(parse_config(AssembleConfig, ["--pipeline", str(tmp_path / "vae"), "--vae", "x"]))


@pytest.mark.parametrize("kind", KINDS)
def test_another_decoder_replaces_the_autoencoder_alone(kind, finished, larger, tmp_path):
    shutil.copytree(finished[kind] / "pipeline", tmp_path / "pipeline")
    vae = tmp_path / "pipeline" / "vae"
    shutil.copy(next(vae.glob("*.safetensors")), vae / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "pipeline" / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    arguments = ["--pipeline", str(tmp_path), "--vae", str(larger[kind] / "vae")]
    for _ in range(2):  # the second time changes nothing
        assemble.main(parse_config(AssembleConfig, arguments))
    changed = {path for path, content in before.items() if not path.exists() or path.read_bytes() != content}
    assert {path for path in changed if path.parent != vae} == {tmp_path / "pipeline" / "model_index.json"}
    assert not (vae / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert_same_weights(weights(tmp_path / "vae_before_assemble"), weights(finished[kind] / "vae"))
    for path in ("model_index.json", "vae/config.json"):
        found, expected = (json.loads((folder / "pipeline" / path).read_text()) for folder in (tmp_path, larger[kind]))
        assert {**found, "_name_or_path": None} == {**expected, "_name_or_path": None}
    pipeline = KINDS[kind][3].from_pretrained(tmp_path / "pipeline")
    assert type(pipeline.vae) is CLASSES[kind][0]


def test_unfinished_decoder_is_neither_published_nor_measured_while_training():
    argv = "--vae x --train_data_dir x --push_to_hub --hub_strategy every_save --metric_features x".split()
    config = parse_config(CONFIG_CLASSES[train_dit], argv)
    config.hub.check_snapshots(True)
    config.monitor.check_decoder(True)
    with pytest.raises(ConfigError, match="whose decoder is not finished"):
        config.hub.check_snapshots(False)
    with pytest.raises(ConfigError, match="its decoder still changes"):
        config.monitor.check_decoder(False)


@pytest.mark.parametrize("kind", KINDS)
def test_larger_decoder_loads_as_our_class_by_its_own_code_and_never_as_a_stock_class(kind, larger, generated, caplog):
    folder, (own_class, stock_class) = larger[kind], CLASSES[kind]
    check_pipeline(folder, kind, waiting(generated[kind], kind))
    vae = load_autoencoder(str(folder))
    assert type(vae) is own_class and vae.decoder.conv_in.out_channels == 16
    assert len(vae.decoder.up_blocks[0].resnets) == 3 and len(vae.encoder.down_blocks[0].resnets) == 1
    latents = torch.randn(1, 3, 8, 8)
    foreign = AutoModel.from_pretrained(str(folder / "vae"), trust_remote_code=True)
    assert type(foreign) is not own_class
    options = {"custom_pipeline": str(folder / "pipeline"), "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline", **options)
    for other in (foreign, pipeline.vae):
        assert torch.equal(other.decode(latents).sample, vae.decode(latents).sample)
    pipeline.save_pretrained(folder / "again")  # with the code that came with it
    assert KINDS[kind][3].from_pretrained(folder / "again").vae.config.decoder_layers_per_block == 2
    with pytest.raises(ValueError, match="DAEAsymmetricUpDecoderBlock2D does not exist"):
        stock_class.from_pretrained(folder / "vae")
    shutil.rmtree(folder / "again")


def test_card_of_a_larger_decoder_says_how_to_load_it(larger):
    for folder in (larger["kl"], larger["kl"] / "vae"):
        card = repository_files(read_result(folder), "user/model")["README.md"].decode()
        assert "no stock diffusers class" in card and "DAEAsymmetricAutoencoderKL.from_pretrained" in card
        assert ("AutoModel.from_pretrained" if folder.name == "vae" else "it is `pipe.vae`") in card
        assert "plain diffusers" not in card
    files = repository_files(read_result(larger["kl"]), "user/model")
    assert "vae/autoencoder_dae_asymmetric.py" in files


def test_stage_three_goes_on_with_a_larger_decoder(larger, image_folder, tmp_path):
    shutil.copytree(larger["kl"], tmp_path / "run")
    flags = {"pipeline": tmp_path / "run" / "pipeline", "output_dir": tmp_path / "run", "train_data_dir": image_folder}
    fit = (
        "--stage 3 --resolution 16 --train_batch_size 4 --stage3_steps 2 --validation_steps 2 --pool_size 4 "
        "--pool_inference_steps 1 --max_psnr_drop 99"
    )
    start(fit, **flags)
    before, after = (DAEDiTPipeline.from_pretrained(f / "pipeline").vae for f in (larger["kl"], tmp_path / "run"))
    assert type(after) is DAEAsymmetricAutoencoderKL and latents_fingerprint(before) == latents_fingerprint(after)
    assert not torch.equal(before.decoder.conv_out.weight, after.decoder.conv_out.weight)


@pytest.mark.parametrize("make", [make_autoencoder, make_vq_model])
def test_size_of_the_decoder_leaves_the_weights_of_stage_one_as_they_are(make):
    def stage1_weights(model):
        return {n: v for n, v in model.state_dict().items() if not n.startswith(("decoder.", "post_quant_conv."))}

    sizes = {"decoder_block_out_channels": [8, 16], "decoder_layers_per_block": 0}
    mirror, other = make(), make(**sizes)
    assert_same_weights(stage1_weights(mirror), stage1_weights(other))
    resized = mirror.with_decoder(**sizes)
    assert_same_weights(stage1_weights(mirror), stage1_weights(resized))
    assert resized.decoder_sizes == other.decoder_sizes == sizes and not mirror.is_asymmetric


@pytest.mark.parametrize(("decoder", "faster"), [("small", 3), ("tiny", 14)])
def test_small_decoders_cost_a_fraction_for_every_encoder(decoder, faster):
    """Counted in multiplications, for the encoders of the recipes for photographs; several channels share a group."""
    for widths in ((64, 128, 128), (64, 128, 128, 128), (128, 256, 512, 512)):
        costs = []
        for sizes in ({}, AutoencoderConfig(decoder=decoder).decoder_sizes(widths)):
            config = {name: (kind,) * len(widths) for name, kind in BLOCKS.items()}
            with torch.device("meta"):
                vae = DAEAsymmetricAutoencoderKL(**config, block_out_channels=widths, **sizes)
            norms = [module for module in vae.decoder.modules() if isinstance(module, torch.nn.GroupNorm)]
            assert not sizes or all(norm.num_channels >= 4 * norm.num_groups for norm in norms)
            with FlopCounterMode(display=False) as counter:
                vae.decode(torch.empty(1, 4, 16, 16, device="meta"))
            costs.append(counter.get_total_flops())
        assert costs[0] > faster * costs[1]


def test_tiny_decoder_serves_the_latents_of_the_same_encoder(stage1, image_folder, tmp_path, pixel_values):
    flags = {"train_data_dir": image_folder, "output_dir": tmp_path, "stage1_dir": stage1["kl"]}
    run(train_dae, f"{TINY_DAE} --stage 2 --decoder tiny", **flags)
    vae = load_autoencoder(str(tmp_path))
    assert (vae.config.decoder_layers_per_block, vae.config.decoder_norm_num_groups) == (0, 2)
    assert vae.decoder.conv_norm_out.num_groups == 2 and len(vae.decoder.up_blocks[0].resnets) == 1
    early = GrowingAutoencoder(str(stage1["kl"]), Path(), torch.device("cpu")).vae
    assert torch.equal(encode_moments(vae, pixel_values)[0], encode_moments(early, pixel_values)[0])


def test_first_channels_of_an_encoder_serve_a_smaller_latent_space(image_folder, tmp_path, pixel_values):
    model = make_autoencoder("prefix").eval()
    with torch.no_grad():  # so that the border is exact, too
        model.auxiliary_decoder.post_quant_conv.bias.zero_()
    model.set_stage(1)
    model.save_pretrained(tmp_path / "stage1")
    before = [model.encode(pixel_values).latent_dist.mean, model.encode(pixel_values).latent_dist.logvar]
    for count in (1, 2, 3):
        smaller = first_latent_channels(model, count)
        smaller.eval().set_stage(1)
        posterior = smaller.encode(pixel_values).latent_dist
        for now, whole in zip((posterior.mean, posterior.logvar), before, strict=True):
            torch.testing.assert_close(now, whole[:, :count], atol=1e-5, rtol=1e-5)
        kept = keep_prefixes(before[0], torch.full((len(pixel_values),), count))
        images = smaller.decode_in_stage(before[0][:, :count])
        torch.testing.assert_close(images, model.decode_in_stage(kept), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="`count` is 4, but must be from 1 to `latent_channels` 3"):
        first_latent_channels(model, 4)
    flags = {"train_data_dir": image_folder, "output_dir": tmp_path, "stage1_dir": tmp_path}
    run(train_dae, f"{TINY_DAE} --stage 2 --keep_latent_channels 2", **flags)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.latent_channels == len(vae.config.latents_mean) == 2
    torch.testing.assert_close(encode_moments(vae, pixel_values)[0], before[0][:, :2], atol=1e-5, rtol=1e-5)
    again = f"{TINY_DAE} --stage 2 --resume_from_checkpoint latest --stage2_steps 5 --keep_latent_channels 1"
    with pytest.raises(UserError, match="with `keep_latent_channels` 2, but now it is 1"):
        run(train_dae, again, **flags)
    again = again.replace("channels 1", "channels 2")
    model.encoder.conv_in.bias.data += 1  # stage 1 was trained on meanwhile
    model.save_pretrained(tmp_path / "stage1")
    with pytest.raises(UserError, match="the autoencoder of `--stage1_dir` changed since"):
        run(train_dae, again, **flags)
    manifest = max((tmp_path / "train_dae" / "checkpoints").glob("*/checkpoint.json"))
    known = json.loads(manifest.read_text())
    del known["state"]["inputs"]["the autoencoder of `--stage1_dir`"]
    manifest.write_text(json.dumps(known))
    run(train_dae, again, **flags)  # a checkpoint of before does not tell


@pytest.mark.parametrize(
    "kind, count, message",
    [
        ("prefix", 4, "is 4, but the encoder in .* has 3 channels. Give at most 3"),
        ("same", 2, "was trained with `auxiliary_decoder same`. Train a stage 1 with `auxiliary_decoder prefix`"),
    ],
)
def test_first_channels_that_do_not_exist_are_refused(kind, count, message, image_folder, tmp_path):
    make_autoencoder(kind).save_pretrained(tmp_path / "stage1")
    flags = {"train_data_dir": image_folder, "output_dir": tmp_path / "new", "stage1_dir": tmp_path}
    with pytest.raises(UserError, match=message):
        run(train_dae, f"{TINY_DAE} --stage 2 --keep_latent_channels {count}", **flags)


def test_an_old_autoencoder_beside_a_new_stage_one_is_refused(tmp_path):
    model = make_autoencoder("same")
    model.save_pretrained(tmp_path / "stage1")
    model.to_diffusers().save_pretrained(tmp_path / "vae")
    assert GrowingAutoencoder(str(tmp_path), Path(), torch.device("cpu")).is_finished
    with torch.no_grad():
        model.encoder.conv_in.bias += 1
    model.save_pretrained(tmp_path / "stage1")
    with pytest.raises(UserError, match="the encoder of `vae/` is not that of `stage1/`"):
        GrowingAutoencoder(str(tmp_path), Path(), torch.device("cpu"))
    assert not GrowingAutoencoder(str(tmp_path / "stage1"), Path(), torch.device("cpu")).is_finished


def test_another_decoder_takes_nothing_from_the_size_of_the_one_before():
    plain = make_autoencoder()
    x2, tiny = (
        AutoencoderConfig(decoder=name).decoder_sizes(plain.config.block_out_channels) for name in ("x2", "tiny")
    )
    shapes = [
        {name: value.shape for name, value in model.with_decoder(**x2).decoder.state_dict().items()}
        for model in (plain, plain.with_decoder(**tiny))
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_of_twice_the_size_serves_the_latents_of_the_same_encoder(
    kind, stage1, generated, image_folder, tmp_path, caplog
):
    flags = {"train_data_dir": image_folder, "output_dir": tmp_path, "stage1_dir": stage1[kind]}
    shutil.copytree(generated[kind] / WAITING, tmp_path / WAITING)
    with caplog.at_level(logging.INFO):
        run(train_dae, TINY_DAE.replace("--resolution 16 ", "--stage 2 --decoder x2 ") + KINDS[kind][0], **flags)
    assert "images have 32x32 pixels" in caplog.text and "the decoder takes" in caplog.text
    vae = load_autoencoder(str(tmp_path))
    early = GrowingAutoencoder(str(stage1[kind]), Path(), torch.device("cpu")).vae
    assert vae.config.sample_size == 32 and spatial_factor(vae) == 2 * spatial_factor(early) == 4
    assert_same_weights(vae.encoder.state_dict(), early.encoder.state_dict())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    small = torch.nn.functional.avg_pool2d(images, 2)
    latents = encode_moments(vae, images)[0]
    assert torch.equal(latents, encode_moments(early, small)[0]) and latents.shape == (2, 3, 8, 8)
    foreign = AutoModel.from_pretrained(str(tmp_path / "vae"), trust_remote_code=True)
    assert vae.decode(latents).sample.shape == images.shape
    assert torch.equal(foreign(images).sample, vae(images).sample)
    pipeline = KINDS[kind][3].from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("cat").images[0].size == (32, 32) and pipeline.vae_scale_factor == 4
    assert_same_weights(load_file(tmp_path / KINDS[kind][4]), waiting(generated[kind], kind))
    other = shutil.copytree(generated[kind], tmp_path / "other")  # whose images were half as large
    assemble.main(parse_config(AssembleConfig, ["--pipeline", str(other), "--vae", str(tmp_path / "vae")]))
    card = repository_files(read_result(other), "user/larger")["README.md"].decode()
    assert "An image of 32x32x3 becomes 8x8x3 latents (factor 4 on each side" in card
    if kind == "kl":
        assert pipeline("cat", height=16, width=48, num_inference_steps=1).images[0].size == (48, 16)
        latents = torch.randn(1, 3, 24, 24)
        for model in (vae, foreign):
            whole = model.decode(latents).sample
            model.enable_tiling()
            tiled = model.decode(latents).sample
            assert tiled.shape == whole.shape == (1, 3, 96, 96)
            torch.testing.assert_close(tiled[..., :32, :32], whole[..., :32, :32], atol=0.5, rtol=0)


def test_warm_start_takes_what_fits_a_deeper_decoder_and_says_what_does_not():
    model = make_autoencoder("same", decoder_layers_per_block=2)
    said = model.start_decoder_from_auxiliary()
    own, auxiliary = model.decoder.state_dict(), model.auxiliary_decoder.decoder.state_dict()
    assert auxiliary.keys() < own.keys()
    assert_same_weights({name: own[name] for name in auxiliary}, auxiliary)
    assert f"takes {len(auxiliary) + 2} of its {len(own) + 2} tensors" in said and "resnets.2" in said
    assert make_autoencoder("same").start_decoder_from_auxiliary() == "the decoder starts from the auxiliary one"


def test_decoder_of_another_size_starts_from_a_published_autoencoder_where_it_fits(caplog):
    vae = make_autoencoder("none", decoder_layers_per_block=0).to_diffusers()
    with caplog.at_level(logging.INFO):
        model = type(make_autoencoder()).from_diffusers(vae, decoder_layers_per_block=1)
    assert "tensors from the autoencoder to start from" in caplog.text
    assert torch.equal(model.decoder.conv_out.weight, vae.decoder.conv_out.weight)
    same = type(model).from_diffusers(vae)
    assert_same_weights(same.to_diffusers().state_dict(), vae.state_dict())


MOVQ = {**TINY_AUTOENCODER, "num_vq_embeddings": 16, "norm_type": "spatial", "block_out_channels": (32, 32)}


@pytest.mark.parametrize("kind", ["kl", "vq with spatial norms"])
def test_stage_two_of_a_published_autoencoder_has_no_auxiliary_decoder(kind, tmp_path, pixel_values):
    vae = make_autoencoder("none").to_diffusers() if kind == "kl" else VQModel(**MOVQ)
    vae.save_pretrained(tmp_path)
    given = {"train_data_dir": "x", "pretrained_model_name_or_path": str(tmp_path), "stage": "2"}
    model = building.make_autoencoder(compose(TrainDAEConfig, **given, autoencoder=kind.split()[0]))
    assert model.auxiliary_decoder is None
    model.set_stage(2)
    model(pixel_values).sample.mean().backward()
    assert model.encoder.conv_in.weight.grad is None and model.decoder.conv_in.weight.grad is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--decoder_block_out_channels 8", "as many widths as the encoder has resolutions: 3"),
        ("--decoder_block_out_channels 8 8 9", r"multiples of `--norm_num_groups` 8; \[9\] are not"),
        ("--stage 3 --pipeline x --decoder_layers_per_block 1", "dae-diffusers assemble"),
        ("--stage 3 --pipeline x --decoder tiny", "dae-diffusers assemble"),
        ("--decoder x2", "`--decoder x2` goes with `--stage 2` only, not with `--stage all`"),
        ("--decoder tiny --decoder_layers_per_block 1", "`--decoder tiny` chooses the decoder's size"),
    ],
)
def test_impossible_decoders_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainDAEConfig, ["--train_data_dir", "x", *flags.split()])
    assert re.search(message, capsys.readouterr().err)
