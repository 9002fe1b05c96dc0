"""
What only a GPU shows: mixed precision, compiled kernels, models that move between devices. Left out by default:

    CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu
"""

import json

import numpy as np
import pytest
import torch
from models import save_backbone, save_run
from scripts import TINY_DAE, TINY_DIT, TINY_PRIOR, assert_same_weights, log_of, resume, run, weights

from dae_diffusers import DAEDiTPipeline, DAEVQGANPipeline
from dae_diffusers.training import cache_latents, evaluate, train_dae, train_dit, train_vqgan_prior

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Compilers, and whatever versions a GPU machine has, warn of things of their own.
    pytest.mark.filterwarnings("default"),
]

# Kernels that add in no fixed order make runs of equal seeds differ a little.
NEARLY = {"rtol": 1e-3, "atol": 1e-4}
# Without dropout: compiled code draws other masks.
SAME = TINY_DAE + " --auxiliary_decoder same"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder):
    """A finished autoencoder and transformer, float32."""
    folder = tmp_path_factory.mktemp("run")
    run(train_dae, SAME, train_data_dir=image_folder, output_dir=folder)
    run(train_dit, TINY_DIT, train_data_dir=image_folder, output_dir=folder, vae=folder / "vae")
    return folder


def losses_of(folder, script):
    return [value for row in log_of(folder, script) for name, value in row.items() if "loss" in name]


@pytest.mark.parametrize("compile_flag", ["", "--compile"])
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_both_scripts_in_every_precision(trained, image_folder, tmp_path, precision, compile_flag, fresh_compiler):
    more = f" --mixed_precision {precision} {compile_flag}"
    run(train_dae, SAME + more, train_data_dir=image_folder, output_dir=tmp_path)
    run(cache_latents, "--resolution 16", train_data_dir=image_folder, vae=trained / "vae", output_dir=tmp_path / "z")
    flags = {"vae": trained / "vae", "latent_cache": tmp_path / "z", "output_dir": tmp_path}
    run(train_dit, TINY_DIT + more, **flags)
    for script in ("train_dae", "train_dit"):
        # Equal seeds: only rounding differs.
        np.testing.assert_allclose(losses_of(tmp_path, script), losses_of(trained, script), rtol=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "vae").values())


def test_resumed_runs_equal_uninterrupted_ones(trained, image_folder, tmp_path):
    resume(train_dae, SAME, trained, tmp_path / "1", 6, ("vae", "stage1"), train_data_dir=image_folder)
    assert_same_weights(weights(trained / "vae"), weights(tmp_path / "1" / "vae"), **NEARLY)
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    resume(train_dit, TINY_DIT, trained, tmp_path / "2", 3, ("pipeline",), **data)
    first, second = (weights(folder / "pipeline" / "transformer") for folder in (trained, tmp_path / "2"))
    assert_same_weights(first, second, **NEARLY)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_all_losses_and_regularisers_at_once(image_folder, tmp_path, precision):
    backbone = save_backbone(tmp_path / "backbone", "resnet")
    flags = (
        f"{TINY_DAE} --mixed_precision {precision} --perceptual_model {backbone} --adversarial_weight 0.5 "
        "--discriminator_channels 8 --discriminator_layers 2 --mask_ratio 0.3 --latent_denoising 1 "
        "--equivariance 0.5 --noise_tau 0.3 --gradient_checkpointing --gradient_accumulation_steps 2"
    )
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path / "run")
    assert np.isfinite(losses_of(tmp_path / "run", "train_dae")).all()
    assert any("train/adaptive_weight" in row for row in log_of(tmp_path / "run"))


@pytest.mark.parametrize("quantizer", ["ema", "vq", "fsq --fsq_levels 3 2 2"])
def test_codebooks_and_their_prior(image_folder, tmp_path, quantizer):
    flags = f"{TINY_DAE} --autoencoder vq --codebook_size 12 --codebook_warmup_steps 1 --quantizer {quantizer}"
    run(train_dae, flags + " --mixed_precision bf16", train_data_dir=image_folder, output_dir=tmp_path)
    flags = TINY_PRIOR + " --mixed_precision bf16 --compile"
    run(train_vqgan_prior, flags, train_data_dir=image_folder, vae=tmp_path / "vae", output_dir=tmp_path)
    pipeline = DAEVQGANPipeline.from_pretrained(tmp_path / "pipeline").to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    assert [image.size for image in pipeline(["cat", 1]).images] == [(16, 16)] * 2


@pytest.mark.parametrize("more", ["", " --feature_model {backbone}", " --generated_loss adversarial"])
def test_decoder_fitted_to_its_generator(image_folder, tmp_path, more):
    folder = save_run(tmp_path / "run", {0: "cat", 1: "dog"})
    more = more.format(backbone=save_backbone(tmp_path / "backbone", "resnet"))
    flags = (
        "--stage 3 --resolution 16 --train_batch_size 4 --stage3_steps 4 --pool_size 12 --pool_inference_steps 2 "
        "--max_psnr_drop 99 --mixed_precision bf16 --discriminator_channels 8 --discriminator_layers 2"
    )
    run(train_dae, flags + more, train_data_dir=image_folder, pipeline=folder / "pipeline", output_dir=folder)
    after = json.loads((folder / "pipeline" / "vae" / "stage3.json").read_text())["after"]
    assert np.isfinite([after["psnr"], after["generated_fd"]]).all()


def test_evaluation_gives_the_numbers_of_a_cpu(trained, image_folder, tmp_path, monkeypatch):
    features = save_backbone(tmp_path / "features", "classifier")
    flags = f"--resolution 16 --features {features} --validation_fraction 0.5"
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    run(evaluate, flags, output_dir=tmp_path / "cuda", **data)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run(evaluate, flags, output_dir=tmp_path / "cpu", **data)
    on_gpu, on_cpu = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("cuda", "cpu"))
    assert on_gpu["reconstruction"].keys() == on_cpu["reconstruction"].keys()
    for name, value in on_cpu["reconstruction"].items():
        assert on_gpu["reconstruction"][name] == pytest.approx(value, rel=5e-3, abs=1e-6), name


def test_pipeline_in_half_precision_compiled_and_offloaded(trained, fresh_compiler):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(0)
        return pipeline(["cat", 1], num_inference_steps=4, generator=generator, output_type="np").images

    expected = draw(DAEDiTPipeline.from_pretrained(trained / "pipeline"))
    exact = draw(DAEDiTPipeline.from_pretrained(trained / "pipeline").to("cuda"))
    np.testing.assert_allclose(exact, expected, atol=5e-3)
    half = DAEDiTPipeline.from_pretrained(trained / "pipeline", torch_dtype=torch.bfloat16).to("cuda")
    assert np.abs(draw(half) - expected).mean() < 0.02
    half.transformer.compile_repeated_blocks()
    assert np.abs(draw(half) - expected).mean() < 0.02
    offloaded = DAEDiTPipeline.from_pretrained(trained / "pipeline")
    offloaded.enable_model_cpu_offload()
    np.testing.assert_allclose(draw(offloaded), expected, atol=5e-3)
