"""The training scripts with a codebook: codes that stay, runs that go on, generators that fit."""

import json
import shutil
from functools import wraps

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import VQModel
from hub_server import HubServer
from models import make_autoencoder, save_backbone
from PIL import Image
from safetensors.torch import load_file
from scripts import (
    DIVERGED_AT_VALIDATION,
    DIVERGING,
    TINY_DAE,
    TINY_DIT,
    TINY_PRIOR,
    assert_same_weights,
    launch,
    log_of,
    resume,
    run,
    succeed,
    weights,
)

from dae_diffusers import DAEAutoencoderKL, DAEDiTPipeline, DAEVQGANPipeline, DAEVQModel
from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.arrays import save_value_range
from dae_diffusers.errors import UserError
from dae_diffusers.latents.codes import CodeGrids, codes_of
from dae_diffusers.metrics.image_quality import peak_signal_to_noise_ratio
from dae_diffusers.pipelines.dae_vqgan import code_fingerprint
from dae_diffusers.settings import compose
from dae_diffusers.training import cache_latents, evaluate, train_dae, train_dit, train_vqgan_prior
from dae_diffusers.training.settings import TrainDAEConfig, TrainPriorConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

KINDS = {"kl": "", "vq": " --autoencoder vq --codebook_size 12 --codebook_warmup_steps 1"}
TINY_VQ = TINY_DAE + KINDS["vq"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder):
    """A finished autoencoder with a codebook."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("vq")
    run(train_dae, TINY_VQ, train_data_dir=image_folder, output_dir=folder)
    return folder


def training_pixels(image_folder):
    images = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))[0]
    return torch.stack([images[n]["pixel_values"] for n in range(8)])


def test_result_is_a_plain_vq_model_with_statistics_and_the_codes_of_stage_one(trained, image_folder):
    vae = VQModel.from_pretrained(trained / "vae")
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 3 and vae.config.scaling_factor == 1.0
    assert not any(name.startswith(("quantizer", "auxiliary")) for name in vae.config)
    stage1 = DAEVQModel.from_pretrained(trained / "stage1").eval()
    with torch.no_grad():
        pixel_values = training_pixels(image_folder)
        stage1.set_stage(1)
        codes = stage1(pixel_values).quantization.codes
        assert torch.equal(vae.quantize(vae.encode(pixel_values).latents)[2][2], codes.flatten())


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_first_channels_are_validated_as_the_prefix_decoder_gets_them(kind, image_folder, tmp_path):
    flags = TINY_DAE + KINDS[kind]
    run(train_dae, flags + " --stage 1 --auxiliary_decoder prefix", train_data_dir=image_folder, output_dir=tmp_path)
    model = {"kl": DAEAutoencoderKL, "vq": DAEVQModel}[kind].from_pretrained(tmp_path / "stage1").eval()
    model.set_stage(1)
    images = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))[1]
    pixel_values = torch.stack([images[n]["pixel_values"] for n in range(len(images))])
    with torch.no_grad():
        latents = model(pixel_values, return_dict=False)[1]
        latents = latents.mean if kind == "kl" else latents.quantized
        for count in (1, 2):
            first = torch.cat([latents[:, :count], torch.zeros_like(latents[:, count:])], dim=1)
            expected = peak_signal_to_noise_ratio(model.auxiliary_decoder(first), pixel_values).mean().item()
            assert log_of(tmp_path)[-1][f"validation/psnr_first_{count}"] == pytest.approx(expected, rel=1e-5)


def test_folder_of_stage_one_loads_as_what_would_be_published(trained, caplog):
    vae = load_autoencoder(str(trained / "stage1"))
    assert "its latents are final, but its decoder has not been trained" in caplog.text
    caplog.clear()
    assert type(vae) is VQModel and code_fingerprint(vae) == code_fingerprint(load_autoencoder(str(trained / "vae")))
    assert "stage 1" not in caplog.text


def test_log_has_the_use_of_the_codebook_over_all_validation_images(trained):
    rows = log_of(trained)
    assert all("train/commitment_loss" in row for row in rows if "train/reconstruction_loss" in row)
    validated = [row for row in rows if "validation/psnr" in row]
    assert validated and all(0 < row["validation/codebook_usage"] <= 1 for row in validated)
    assert all(1 <= row["validation/codebook_perplexity"] <= 12 for row in validated)


@pytest.mark.parametrize("step", [3, 4, 6])
def test_resumed_run_equals_an_uninterrupted_one(trained, image_folder, tmp_path, step):
    resume(train_dae, TINY_VQ, trained, tmp_path / "run", step, ("vae",), train_data_dir=image_folder)
    assert_same_weights(weights(trained / "vae"), weights(tmp_path / "run" / "vae"))
    for file in ("vae/config.json", "train_dae/log.jsonl"):
        expected, resumed = ((folder / file).read_text() for folder in (trained, tmp_path / "run"))
        assert expected.replace(str(trained), "") == resumed.replace(str(tmp_path / "run"), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--no_l2_normalize_codes", "was trained with `l2_normalize_codes`, but now it is off. Give it again"),
        ("--quantizer vq", "was trained with `quantizer` ema, but now it is vq"),
    ],
)
def test_resuming_with_another_quantizer_is_refused(change, message, trained, image_folder):
    flags = f"{TINY_VQ} {change} --resume_from_checkpoint latest"
    with pytest.raises(UserError, match=message):
        run(train_dae, flags, train_data_dir=image_folder, output_dir=trained)


@pytest.mark.parametrize("flags", ["--stage 2", "--quantizer vq", "--quantizer vq --auxiliary_decoder none"])
def test_training_starts_from_a_published_codebook(flags, trained, image_folder, tmp_path):
    flags = f"{TINY_VQ} --learning_rate 1e-9 --pretrained_model_name_or_path {trained / 'vae'} {flags}"
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path / "run")
    before, after = weights(trained / "vae"), weights(tmp_path / "run" / "vae")
    assert_same_weights(before, after, rtol=0, atol=1e-6)
    is_kept = [torch.equal(before[name], after[name]) for name in before if name.startswith(("encoder.", "quant"))]
    assert all(is_kept) == ("--stage 2" in flags)


def test_published_autoencoder_of_the_other_kind_is_refused(trained, image_folder, tmp_path):
    with pytest.raises(
        UserError, match="is of class VQModel, but `autoencoder kl` takes a model of class AutoencoderKL"
    ):
        run(
            train_dae,
            TINY_DAE,
            pretrained_model_name_or_path=trained / "vae",
            train_data_dir=image_folder,
            output_dir=tmp_path,
        )


@pytest.mark.parametrize(
    "flags",
    [
        "--quantizer vq",
        "--quantizer vq --no_l2_normalize_codes --gradient_checkpointing",
        "--quantizer fsq --fsq_levels 3 2 2 --mixed_precision bf16",
        "--auxiliary_decoder none",
    ],
)
def test_every_quantizer_trains(flags, image_folder, tmp_path):
    flags = f"{TINY_VQ} --stage1_steps 2 --stage2_steps 1 {flags}"
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path)
    assert VQModel.from_pretrained(tmp_path / "vae").config.num_vq_embeddings == 12


def test_second_stage_alone_keeps_the_codebook(trained, image_folder, tmp_path):
    flags = TINY_VQ + " --stage 2"
    data = {"train_data_dir": image_folder, "stage1_dir": trained}
    run(train_dae, flags, output_dir=tmp_path / "two", **data)
    both, alone = weights(trained / "vae"), weights(tmp_path / "two" / "vae")
    for name in both:
        if name.split(".")[0] in ("encoder", "quant_conv", "quantize"):
            assert torch.equal(both[name], alone[name])
    with pytest.raises(UserError, match="holds a DAEVQModel"):
        run(train_dae, flags.replace("--autoencoder vq", "--autoencoder kl"), output_dir=tmp_path / "kl", **data)


def test_two_processes_equal_one_that_accumulates(image_folder, tmp_path):
    # One step after k-means: from then on, a rounding error in a latent may choose another code.
    flags = TINY_VQ + " --stage1_steps 2 --stage2_steps 1"
    data = {"train_data_dir": image_folder}
    succeed(launch("train_dae", flags + " --gradient_accumulation_steps 2", output_dir=tmp_path / "1", **data))
    succeed(launch("train_dae", flags, processes=2, output_dir=tmp_path / "2", **data))
    assert_same_weights(*(weights(tmp_path / name / "stage1") for name in "12"), rtol=1e-3, atol=1e-4)


def test_transformer_trains_on_latents_before_quantisation(trained, image_folder, tmp_path):
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    run(cache_latents, "--resolution 16 --dtype float32 --random_flip", output_dir=tmp_path / "cache", **data)
    run(train_dit, TINY_DIT + " --random_flip", output_dir=tmp_path / "images", **data)
    run(train_dit, TINY_DIT, output_dir=tmp_path / "cached", vae=trained / "vae", latent_cache=tmp_path / "cache")
    transformers = [weights(tmp_path / name / "pipeline" / "transformer") for name in ("images", "cached")]
    assert_same_weights(*transformers, rtol=1e-3, atol=1e-4)
    pipeline = DAEDiTPipeline.from_pretrained(tmp_path / "images" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.vae, VQModel)
    latents = torch.randn(1, 3, 8, 8)
    raw = latents * torch.tensor(pipeline.vae.config.latents_std).view(1, 3, 1, 1)
    raw = raw + torch.tensor(pipeline.vae.config.latents_mean).view(1, 3, 1, 1)
    codes = pipeline.vae.quantize(raw)[2][2]
    quantized = pipeline.vae.quantize.get_codebook_entry(codes, (1, 8, 8, 3))
    with torch.no_grad():
        expected = pipeline.vae.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(pipeline.decode_latents(latents), expected, rtol=1e-4, atol=1e-5)
    assert pipeline("cat", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_evaluation_reports_the_use_of_the_codebook(trained, image_folder, tmp_path):
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    run(evaluate, "--resolution 16", output_dir=tmp_path, **data)
    results = json.loads((tmp_path / "metrics.json").read_text())["codebook"]
    vae = VQModel.from_pretrained(trained / "vae")
    images = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))[0]
    with torch.no_grad():
        pixel_values = torch.stack([images[n]["pixel_values"] for n in range(len(images))])
        codes = vae.quantize(vae.encode(pixel_values).latents)[2][2]
    assert results["train_codebook_usage"] == len(codes.unique()) / 12
    assert "train_codebook_perplexity" in (tmp_path / "metrics.md").read_text()


@pytest.mark.parametrize(
    "flags",
    ["--random_crop", "--attention_head_dim 3", "--sample_top_p 0", "--sample_temperature 0", "--sample_top_k 0"],
)
def test_impossible_flags_of_the_prior_exit_with_two(flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(TrainPriorConfig, f"--dataset_name digits --vae vae {flags}".split())
    assert exit_info.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quantizer fsq", "--fsq_levels"),
        ("--quantizer fsq --fsq_levels 8 1", "at least 2"),
        ("--codebook_size 1", "at least 2"),
        ("--commitment_weight -1", "0 or more"),
        ("--autoencoder vq --stage1_steps 100 --codebook_warmup_steps 100", "below the 100 steps"),
    ],
)
def test_impossible_flags_exit_with_two(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(TrainDAEConfig, f"--dataset_name digits {flags}".split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def with_prior(trained, image_folder, tmp_path_factory):
    """A finished prior over the codes of `trained`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("prior")
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    run(train_vqgan_prior, TINY_PRIOR, curves=True, output_dir=folder, **data)
    return folder


def prior_weights(folder):
    return load_file(folder / "pipeline" / "prior" / "model.safetensors")


def test_prior_is_saved_as_a_pipeline_that_draws_by_class_name(trained, with_prior):
    pipeline = DAEVQGANPipeline.from_pretrained(with_prior / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert [image.size for image in pipeline(["cat", 1]).images] == [(16, 16)] * 2
    assert pipeline.config.default_guidance_scale == 2
    untaught = compose(TrainPriorConfig, train_data_dir="x", vae="y", class_dropout_prob=0.0)
    assert train_vqgan_prior.sampling_options(untaught)["guidance_scale"] == 1
    assert pipeline.prior.config.code_fingerprint == code_fingerprint(VQModel.from_pretrained(trained / "vae"))
    assert (with_prior / "train_vqgan_prior" / "grids" / "samples-00000006.png").exists()
    assert (with_prior / "train_vqgan_prior" / "curves.png").stat().st_size > 1000
    num_parameters = sum(parameter.numel() for parameter in pipeline.prior.parameters())
    record = json.loads((with_prior / "train_vqgan_prior" / "run.json").read_text())
    assert record["counts"] == {"training_images": 23, "parameters": num_parameters}


def test_cached_codes_are_those_of_the_images_and_their_mirror_images(trained, with_prior, image_folder):
    vae = VQModel.from_pretrained(trained / "vae")
    images = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16, random_flip=True))[0]
    pixel_values = torch.stack([images[n]["pixel_values"] for n in range(len(images))])
    with torch.no_grad():
        expected = [codes_of(vae, vae.encode(view).latents) for view in (pixel_values, pixel_values.flip(-1))]
    cached = load_file(with_prior / "codes" / "train.safetensors")["codes"]
    assert torch.equal(cached, torch.stack(expected, dim=1).int())
    grids = CodeGrids(cached, torch.tensor(images.labels), images.id2label)
    batch = grids.__getitems__([(3, 2), (3, 1), 3])
    assert torch.equal(batch["codes"], cached[[3, 3, 3], [0, 1, 0]].long())
    assert batch["class_labels"].tolist() == [images.labels[3]] * 3


def test_resumed_prior_equals_an_uninterrupted_one(trained, with_prior, image_folder, tmp_path):
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    resume(train_vqgan_prior, TINY_PRIOR, with_prior, tmp_path / "run", 3, ("pipeline",), **data)
    assert_same_weights(prior_weights(with_prior), prior_weights(tmp_path / "run"))
    logs = [(folder / "train_vqgan_prior" / "log.jsonl").read_text() for folder in (with_prior, tmp_path / "run")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("rate", "message"), DIVERGED_AT_VALIDATION)
def test_prior_whose_divergence_a_validation_meets_first_says_what_to_do(
    rate, message, trained, image_folder, tmp_path
):
    flags = TINY_PRIOR.replace("--validation_steps 4", "--validation_steps 1")
    flags += f" --lr_warmup_steps 0 --learning_rate {rate}"
    with pytest.raises(UserError, match=message):
        run(train_vqgan_prior, flags, train_data_dir=image_folder, vae=trained / "vae", output_dir=tmp_path)


def test_prior_that_diverges_is_neither_saved_nor_exported(trained, image_folder, tmp_path):
    options = {"train_data_dir": image_folder, "vae": trained / "vae", "output_dir": tmp_path}
    with pytest.raises(UserError, match="NaN or infinite|became|not finite"):
        run(train_vqgan_prior, TINY_PRIOR.replace("_limit 9", "_limit 1") + DIVERGING, **options)
    assert not (tmp_path / "pipeline").exists()
    for path in (tmp_path / "train_vqgan_prior" / "checkpoints").rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path


def test_resuming_a_prior_with_another_size_is_refused(trained, with_prior, image_folder):
    options = {"train_data_dir": image_folder, "vae": trained / "vae", "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="was trained with `resolution` 16, but now it is 32. Continue with 16"):
        run(train_vqgan_prior, TINY_PRIOR + " --resolution 32", output_dir=with_prior, **options)


def test_prior_sees_images_in_the_range_of_its_autoencoder(trained, tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "images" / f"{number}.png")
    shutil.copytree(trained / "vae", tmp_path / "vae")
    save_value_range([-100.0, 500.0], tmp_path / "vae")
    data = {"train_data_dir": tmp_path / "images", "output_dir": tmp_path / "run"}
    run(train_vqgan_prior, TINY_PRIOR, vae=tmp_path / "vae", **data)
    config = DataConfig(train_data_dir=str(tmp_path / "images"), resolution=16, value_range=[-100.0, 500.0])
    pixel_values = torch.stack([item["pixel_values"] for item in load_images(config)[0]])
    vae = VQModel.from_pretrained(trained / "vae")
    with torch.no_grad():
        expected = codes_of(vae, vae.encode(pixel_values).latents)
    assert torch.equal(load_file(tmp_path / "run" / "codes" / "train.safetensors")["codes"][:, 0], expected.int())
    assert DAEVQGANPipeline.from_pretrained(tmp_path / "run" / "pipeline").value_range == [-100, 500]


def test_prior_is_pushed_at_every_save(trained, image_folder, tmp_path, monkeypatch):
    flags = TINY_PRIOR + " --push_to_hub --hub_strategy every_save --hub_license mit --mixed_precision bf16"
    with HubServer() as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        data = {"train_data_dir": image_folder, "vae": trained / "vae"}
        succeed(launch("train_vqgan_prior", flags, output_dir=tmp_path / "run", **data))
        messages = list(hub.repositories["model", "writer/run"].messages.values())
    assert messages == ["initial commit", "Step 3", "Upload DAEVQGANPipeline"]


def test_two_processes_train_the_prior_that_one_does(trained, with_prior, image_folder, tmp_path):
    flags = TINY_PRIOR.replace("--train_batch_size 4", "--train_batch_size 2")
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    succeed(launch("train_vqgan_prior", flags, processes=2, output_dir=tmp_path / "2", **data))
    codes = [load_file(folder / "codes" / "train.safetensors")["codes"] for folder in (with_prior, tmp_path / "2")]
    assert torch.equal(*codes)
    run(train_vqgan_prior, flags + " --gradient_accumulation_steps 2", output_dir=tmp_path / "1", **data)
    assert_same_weights(prior_weights(tmp_path / "1"), prior_weights(tmp_path / "2"), rtol=1e-3, atol=1e-4)


def test_prior_refuses_other_codes_with_a_line(trained, with_prior, image_folder, tmp_path):
    run(
        train_dae, TINY_VQ + " --stage1_steps 2 --stage2_steps 1 --seed 1",
        train_data_dir=image_folder, output_dir=tmp_path,
    )  # fmt: skip
    shutil.copytree(with_prior, tmp_path / "run")
    options = {"train_data_dir": image_folder, "output_dir": tmp_path / "run", "vae": tmp_path / "vae"}
    with pytest.raises(UserError, match="the codes of `--vae` changed") as error:
        run(train_vqgan_prior, TINY_PRIOR + " --resume_from_checkpoint latest", **options)
    assert "\n" not in str(error.value)
    AcceleratorState._reset_state(reset_partial_state=True)
    options |= {"output_dir": tmp_path / "new", "code_cache": with_prior / "codes"}
    with pytest.raises(UserError, match="do not fit: its autoencoder is") as error:
        run(train_vqgan_prior, TINY_PRIOR, **options)
    assert "\n" not in str(error.value)


def test_flat_folder_trains_an_unconditional_prior(trained, image_folder, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in image_folder.rglob("*.png"):
        shutil.copy(path, tmp_path / "flat")
    flags = TINY_PRIOR + " --max_train_steps 1 --gradient_checkpointing --mixed_precision bf16"
    run(
        train_vqgan_prior, flags,
        train_data_dir=tmp_path / "flat", output_dir=tmp_path / "run", vae=trained / "vae",
    )  # fmt: skip
    pipeline = DAEVQGANPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.null_class is None and pipeline.prior.dtype == torch.float32
    assert len(pipeline(num_images_per_label=3).images) == 3


def test_autoencoder_without_codes_and_damaged_codes_are_named(trained, with_prior, image_folder, tmp_path):
    make_autoencoder("none").to_diffusers().save_pretrained(tmp_path / "kl")
    options = {"train_data_dir": image_folder, "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match="has no codes"):
        run(train_vqgan_prior, TINY_PRIOR, vae=tmp_path / "kl", **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.rmtree(tmp_path / "run")
    whole = (with_prior / "codes" / "train.safetensors").read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (b"nothing", whole[:-4], flipped):
        (tmp_path / "codes").mkdir(exist_ok=True)
        (tmp_path / "codes" / "train.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="damaged. Remove it to encode the images again"):
            run(train_vqgan_prior, TINY_PRIOR, vae=trained / "vae", code_cache=tmp_path / "codes", **options)
        AcceleratorState._reset_state(reset_partial_state=True)
        shutil.rmtree(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*covariance is singular", "ignore:.*fewer")
def test_evaluation_draws_codes(with_prior, image_folder, tmp_path, monkeypatch):
    extractor = save_backbone(tmp_path / "extractor", "classifier")
    shutil.copytree(with_prior / "pipeline", tmp_path / "pipeline")
    calls = []
    original = DAEVQGANPipeline.__call__
    counted = wraps(original)(lambda self, *a, **k: calls.append(k) or original(self, *a, **k))
    monkeypatch.setattr(DAEVQGANPipeline, "__call__", counted)
    run(
        evaluate, "--resolution 16 --validation_fraction 0.5 --num_images 12 --top_p 0.9 --guidance_scales 1 2 --set_defaults",
        train_data_dir=image_folder, pipeline=tmp_path / "pipeline", features=extractor, output_dir=tmp_path / "out",
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["generation"]
    assert [row["guidance_scale"] for row in rows] == [1.0, 2.0] == [call["guidance_scale"] for call in calls]
    assert all(call["top_p"] == 0.9 and "num_inference_steps" not in call for call in calls)
    assert (tmp_path / "out" / "samples-guidance-2.png").exists() and (tmp_path / "out" / "sweep.png").exists()
    # A call draws now as it was measured best, a pipeline of before as it was trained.
    distance = next(name for name in rows[0] if name.startswith("gfd"))
    best = min(rows, key=lambda row: row[distance])["guidance_scale"]
    measured, trained = (DAEVQGANPipeline.from_pretrained(each / "pipeline") for each in (tmp_path, with_prior))
    assert (measured.config.default_top_p, measured.config.default_guidance_scale) == (0.9, best)
    assert (trained.config.default_temperature, trained.config.default_top_p) == (1.0, None)
    codes = [
        pipe(
            0, output_type="codes", num_images_per_label=20, generator=torch.Generator().manual_seed(0), **options
        ).images
        for pipe, options in (
            (measured, {}),
            (trained, {"top_p": 0.9, "guidance_scale": best}),
            (measured, {"top_p": 1.0, "guidance_scale": 1.0}),
            (trained, {"guidance_scale": 1.0}),
        )
    ]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[2], codes[3]) and not torch.equal(codes[1], codes[3])
