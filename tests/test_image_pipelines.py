"""Images from images, parts of images, and series of images."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from models import make_autoencoder, save_text_encoder
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from dae_diffusers import (
    DAEDiTImg2ImgPipeline,
    DAEDiTInpaintPipeline,
    DAEDiTInterpolationPipeline,
    DAEDiTPipeline,
    DAEDiTTransformer2DModel,
)
from dae_diffusers.pipelines import dae_dit_img2img, dae_dit_inpaint, dae_dit_interpolate
from dae_diffusers.pipelines.dae_dit_inpaint import blended
from dae_diffusers.pipelines.dae_dit_interpolate import slerp

KINDS = {"img2img": DAEDiTImg2ImgPipeline, "inpaint": DAEDiTInpaintPipeline, "interpolate": DAEDiTInterpolationPipeline}
EXACT = {"atol": 1e-5, "rtol": 0}


def make_pipeline(pipeline_class=DAEDiTPipeline, scheduler="FlowMatchEulerDiscreteScheduler", vae=None, **settings):
    """An untrained pipeline, of flow matching unless the scheduler is for diffusion."""
    if vae is None:
        statistics = {"latents_mean": [0.1, -0.2, 0.3], "latents_std": [1.0, 0.5, 2.0], "scaling_factor": 1.0}
        vae = make_autoencoder().to_diffusers()
        vae.register_to_config(**statistics)
    torch.manual_seed(0)
    transformer = DAEDiTTransformer2DModel(
        8, in_channels=3, num_classes=2, num_layers=1, num_attention_heads=2, attention_head_dim=8
    )
    for module in (transformer.modulation, transformer.proj_out):
        torch.nn.init.normal_(module.weight, std=0.2)
    base = FlowMatchEulerDiscreteScheduler() if "DDIM" not in scheduler else DDIMScheduler()
    settings = {"id2label": {0: "cat", 1: "dog"}, "is_flow_matching": "DDIM" not in scheduler, **settings}
    pipeline = pipeline_class(transformer.eval(), vae.eval(), base, **settings)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(base.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipeline, *args, seed=0, output_type="pt", num_inference_steps=4, **kwargs):
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipeline(*args, output_type=output_type, num_inference_steps=num_inference_steps, **kwargs).images


def picture(seed=0, mode="RGB", size=(16, 16)) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    return Image.fromarray(numbers).convert("RGB" if mode == "P" else "RGBA").convert(mode)


def in_0_1(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype("float32") / 255).movedim(-1, 0)[None]


def left_half(size=16) -> Image.Image:
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    return mask


NUMPY_IN_SCHEDULERS = "ignore:__array_:DeprecationWarning"  # diffusers' schedulers hand tensors to numpy
SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DDIMScheduler",
)


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_strength_goes_from_the_reconstruction_to_a_drawing_without_the_image(scheduler):
    plain = make_pipeline(scheduler=scheduler)
    pipeline = DAEDiTImg2ImgPipeline.from_pipe(plain)
    image = in_0_1(picture())
    with torch.no_grad():
        reconstruction = plain.vae.decode(plain.vae.encode(2 * image - 1).latent_dist.mode()).sample / 2 + 0.5
    reconstruction = reconstruction.clamp(0, 1)
    assert_close(draw(pipeline, "dog", image, 0.0), reconstruction, **EXACT)
    assert torch.equal(draw(pipeline, "dog", image, 1.0), draw(plain, "dog"))
    distances = [(draw(pipeline, "dog", image, s) - reconstruction).square().mean().item() for s in (0.3, 0.6, 1.0)]
    assert 0 < distances[0] < min(distances[1:])


def test_steps_and_noise_are_those_of_the_schedulers_end():
    """Of ten steps, strength 0.4 does the last four: the latents begin as (1 - sigma) image + sigma noise."""
    pipeline, calls, noise = make_pipeline(DAEDiTImg2ImgPipeline), [], torch.randn(1, 3, 8, 8)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0], kwargs["timestep"][0].item())), with_kwargs=True
    )
    image = in_0_1(picture())
    draw(pipeline, "cat", image, 0.4, num_inference_steps=10, latents=noise, guidance_scale=1.0)
    assert len(calls) == pipeline.num_timesteps == 4
    sigma = pipeline.scheduler.sigmas[6]
    assert calls[0][1] == pytest.approx(1000 * sigma.item())
    assert_close(calls[0][0], (1 - sigma) * pipeline.encode_pixels(image) + sigma * noise)
    draw(pipeline, "cat", image, 0.001, num_inference_steps=10)
    assert len(calls) == 4 + 1  # guided, in one call


def test_encoding_undoes_what_decoding_does_first():
    for vae in (None, make_autoencoder(scaling_factor=0.3, shift_factor=0.5).to_diffusers()):
        pipeline = make_pipeline(DAEDiTImg2ImgPipeline, vae=vae)
        pixels = in_0_1(picture())
        latents = pipeline.encode_pixels(pixels)
        with torch.no_grad():
            mean = pipeline.vae.encode(2 * pixels - 1).latent_dist.mode()
        assert_close(pipeline.raw_latents(latents), mean, atol=1e-5, rtol=1e-5)


def test_images_come_in_every_form_that_the_pipeline_gives():
    pipeline = make_pipeline(DAEDiTImg2ImgPipeline)
    image = picture()
    array = np.asarray(image)
    expected = draw(pipeline, "cat", image, 0.5)
    for same in (
        array,
        array[:, ::-1].copy()[:, ::-1],  # mirrored in memory
        (array / 255.0).astype(">f4"),
        array[None] / 255.0,
        in_0_1(image),
        in_0_1(image)[0],
        [image],
        torch.tensor(array).movedim(-1, 0),
    ):
        assert_close(draw(pipeline, "cat", same, 0.5), expected, **EXACT)
    assert draw(pipeline, "cat", picture(size=(40, 20)), 0.5).shape == (1, 3, 16, 16)
    assert draw(pipeline, "cat", picture(size=(40, 20)), 0.5, height=8, width=24).shape == (1, 3, 8, 24)
    both = [picture(0), np.asarray(picture(1, size=(8, 24)))]
    assert draw(pipeline, ["cat", "dog"], both, 0.5).shape == (2, 3, 16, 16)


def test_arrays_are_in_the_range_of_the_original_images():
    vae = make_autoencoder(in_channels=1, out_channels=1).to_diffusers()
    pipeline = make_pipeline(DAEDiTImg2ImgPipeline, vae=vae, value_range=[-1000.0, 3000.0])
    drawn = draw(pipeline, "cat", picture(mode="L"), 0.5, output_type="np")
    pixels = pipeline.prepare_images(drawn, 16, 16)
    np.testing.assert_allclose(pixels[0, 0] * 4000 - 1000, drawn[0, :, :, 0], atol=0.01)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA"])
def test_pictures_of_every_mode_have_the_colours_that_one_sees(mode):
    pipeline = make_pipeline(DAEDiTImg2ImgPipeline)
    white = Image.new("RGBA", (16, 16), "white")
    seen = Image.alpha_composite(white, picture(mode=mode).convert("RGBA")).convert("RGB")
    assert torch.equal(pipeline.prepare_images(picture(mode=mode), 16, 16), in_0_1(seen))
    pipeline.vae = make_autoencoder(in_channels=4, out_channels=4).to_diffusers()
    kept = in_0_1(picture(mode=mode).convert("RGBA"))
    kept[:, :3] = torch.where(kept[:, 3:] > 0, kept[:, :3], 1.0)
    assert torch.equal(pipeline.prepare_images(picture(mode=mode), 16, 16), kept)
    unseen = pipeline.prepare_images(Image.new("RGBA", (16, 16), (9, 90, 200, 0)), 16, 16)
    assert torch.equal(unseen, torch.tensor([1.0, 1, 1, 0]).view(1, 4, 1, 1).expand(1, 4, 16, 16))


@pytest.mark.parametrize(
    ("labels", "images", "per_label", "asked"),
    [("cat", 1, 2, [0, 0]), ("dog", 2, 1, [1, 1]), (["cat", "dog"], 1, 2, [0, 0, 1, 1]), (None, 2, 2, [2, 2, 2, 2])],
)
def test_each_label_has_its_image(labels, images, per_label, asked):
    pipeline, calls = make_pipeline(DAEDiTImg2ImgPipeline), []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    given = [picture(seed) for seed in range(images)]
    drawn = draw(pipeline, labels, given, 0.3, num_images_per_label=per_label, guidance_scale=1.0)
    assert calls[0] == asked
    alone = (
        draw(pipeline, labels, given[-1], 0.3, latents=pipeline._noise[-1:], guidance_scale=1.0)
        if len(asked) == 1
        else None
    )
    assert alone is None or torch.equal(alone, drawn[-1:])
    still = draw(pipeline, iter(asked[:1]), given, 0.0, num_images_per_label=per_label)
    assert torch.equal(still[0], still[-1]) == (images == 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strength": 1.5}, "`strength` is 1.5, but must lie between 0"),
        ({"strength": "0.5"}, "`strength` is '0.5', but must lie between 0"),
        ({"image": None}, "`image` is a NoneType, but must be a picture"),
        ({"image": []}, "`image` is empty"),
        ({"image": "cat.png"}, "`image` is a str"),
        ({"image": np.zeros((4, 16, 16))}, "16 channels, but the autoencoder takes 3"),
        ({"image": torch.full((3, 16, 16), 255.0)}, r"numbers from 255 to 255, but must lie in \[0, 1\]"),
        ({"image": torch.full((3, 16, 16), float("nan"))}, "numbers from nan"),
        ({"image": torch.zeros(16)}, r"shape \(16,\)"),
        ({"image": Image.new("I;16", (16, 16))}, "picture of mode I;16, not of 8 bits"),
        ({"image": [picture()] * 3, "class_labels": [0, 1]}, "3 images, but there are 2 labels"),
        ({"height": 18}, "`height` is 18"),
        ({"image": torch.zeros(0, 3, 16, 16)}, "`image` is empty: its shape is"),
        ({"num_images_per_prompt": 0}, "`num_images_per_label` is 0"),
    ],
)
def test_bad_image_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        draw(make_pipeline(DAEDiTImg2ImgPipeline), **{"class_labels": "cat", "image": picture(), **kwargs})
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pixels_outside_of_the_mask_stay(scheduler):
    """In the result bit for bit; the latents there are, after each step, the image's with that step's noise."""
    pipeline, seen = make_pipeline(DAEDiTInpaintPipeline, scheduler), []

    def watch(pipe, step, timestep, tensors):
        seen.append((tensors["latents"][..., 4:], pipe._noised_images(step + 1)[..., 4:]))
        return {}

    image = picture()
    options = {"image": image, "mask_image": left_half(), "callback_on_step_end": watch}
    (result,) = draw(pipeline, "dog", output_type="pil", **options)
    changed = (np.asarray(result) != np.asarray(image)).any(axis=-1)
    assert not changed[:, 8:].any() and changed[:, :8].mean() > 0.9
    assert seen and all(torch.equal(latents, expected) for latents, expected in seen)
    assert_close(seen[-1][0], pipeline.encode_pixels(in_0_1(image))[..., 4:], **EXACT)


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_kept_part_has_the_noise_of_the_time_that_the_transformer_is_told(scheduler, strength):
    pipeline, calls = make_pipeline(DAEDiTInpaintPipeline, "DDIMScheduler"), []
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args[0], kwargs["timestep"][0].item())), with_kwargs=True
    )
    image, nothing = in_0_1(picture()), torch.zeros(1, 1, 16, 16)
    noise, shares = torch.randn(1, 3, 8, 8), pipeline.scheduler.alphas_cumprod
    draw(pipeline, "cat", image, nothing, strength, latents=noise, guidance_scale=1.0)
    log_sigmas = ((1 - shares) / shares).log().numpy() / 2
    for latents, timestep in calls[1:]:  # of the first some schedulers have all noise
        sigma = np.exp(np.interp(timestep, np.arange(len(log_sigmas)), log_sigmas))
        expected = (pipeline.encode_pixels(image) + sigma * noise) / (sigma**2 + 1) ** 0.5
        assert_close(latents, expected.float(), atol=0.02, rtol=0)


def test_mask_of_everything_is_a_drawing_and_of_nothing_the_image():
    pipeline, image = make_pipeline(DAEDiTInpaintPipeline), in_0_1(picture())
    assert torch.equal(draw(pipeline, "dog", image, Image.new("L", (16, 16), 255)), draw(make_pipeline(), "dog"))
    assert_close(draw(pipeline, "dog", image, np.zeros((16, 16), bool)), image, atol=1e-6, rtol=0)


def on_transparency(mask: Image.Image) -> Image.Image:
    """A mask as paint programs make it."""
    canvas = Image.new("RGBA", mask.size, (0, 0, 0, 0))
    canvas.paste((255, 255, 255, 255), mask=mask)
    return canvas


def test_masks_come_in_every_form_and_several():
    pipeline = make_pipeline(DAEDiTInpaintPipeline)
    expected = draw(pipeline, "cat", picture(), left_half(), 0.5)
    large = left_half(64)
    array = np.asarray(left_half())
    for same in (
        large,
        large.convert("RGB"),
        large.convert("1"),
        array,
        array[..., None] > 0,
        (array > 0).astype(np.uint8),
        Image.fromarray((array > 0).astype(np.uint8)),
        torch.tensor(array) / 255,
        on_transparency(left_half()),
    ):
        assert torch.equal(draw(pipeline, "cat", picture(), same, 0.5), expected)
    turned = left_half().transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown turned by a quarter
    assert torch.equal(draw(pipeline, "cat", picture(), turned, 0.5), expected)
    masks = [left_half(), left_half().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    images = draw(pipeline, "cat", picture(), masks, generator=seeds(0, 1))
    assert torch.equal(images[0, ..., 8:], images[0, ..., 8:]) and images.shape == (2, 3, 16, 16)
    assert_close(images[:1, ..., 8:], in_0_1(picture())[..., 8:], atol=1e-6, rtol=0)
    assert_close(images[1:, ..., :8], in_0_1(picture())[..., :8], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_image": picture()}, "`mask_image` is not gray, but must be: white is regenerated"),
        ({"mask_image": np.zeros((16, 16, 2))}, "`mask_image` is not gray"),
        ({"mask_image": None}, "`mask_image` is a NoneType"),
        ({"mask_image": [left_half()] * 3, "image": [picture()] * 2}, "3 masks for 2 images"),
        ({"blend_width": -1}, "`blend_width` is -1"),
        ({"blend_width": 2.5}, "`blend_width` is 2.5, but must be 0"),
        ({"blend_width": "3"}, "`blend_width` is '3', but must be 0"),
        ({"output_type": "jpg"}, "`output_type` is 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]"),
    ],
)
def test_bad_mask_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw(
            make_pipeline(DAEDiTInpaintPipeline),
            **{"class_labels": "cat", "image": picture(), "mask_image": left_half(), **kwargs},
        )


@pytest.mark.parametrize("inside", [1, 4, 16])
def test_a_decoder_that_is_too_bright_leaves_no_seam(inside):
    """The mean error outside is taken back near the edge, also in a mask that is thinner than the blend, and nothing else."""
    ramp = torch.linspace(-1, 0.5, 48).expand(1, 1, 48, 48)
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., 24 : 24 + inside] = 1
    result = blended(ramp, ramp + 0.3, mask, 6)
    assert torch.equal(result[mask == 0], ramp[mask == 0])
    assert result.diff(dim=-1).abs().max() < 0.03 + 0.3 / 6
    assert_close(result[..., 24], ramp[..., 24], atol=0.04, rtol=0)
    if inside == 16:
        assert_close(result[..., 32], ramp[..., 32] + 0.3)
    assert torch.equal(blended(ramp, ramp + 0.3, mask, 0)[mask == 1], (ramp + 0.3)[mask == 1])


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "DDIMScheduler", "LTXEulerAncestralRFScheduler"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_series_ends_in_the_two_samples(scheduler, guidance_scale):
    plain, options = make_pipeline(scheduler=scheduler), {"guidance_scale": guidance_scale}
    pipeline = DAEDiTInterpolationPipeline.from_pipe(plain)
    images = draw(pipeline, ("cat", "dog"), generator=seeds(3, 4), num_images=5, **options)
    assert_close(images[:1], draw(plain, "cat", seed=3, **options), **EXACT)
    assert_close(images[-1:], draw(plain, "dog", seed=4, **options), **EXACT)
    whole = (images[-1] - images[0]).norm()
    assert images.shape == (5, 3, 16, 16) and all(step.norm() < whole for step in images[:-1].diff(dim=0))


def test_a_series_of_one_seed_changes_its_class_and_of_one_class_its_seed():
    pipeline, plain = make_pipeline(DAEDiTInterpolationPipeline), make_pipeline()
    classes = draw(pipeline, ("cat", "dog"), seed=5, num_images=3)
    for place, label in ((0, "cat"), (2, "dog")):
        assert_close(classes[place : place + 1], draw(plain, label, seed=5), **EXACT)
    series = draw(pipeline, "cat", generator=seeds(0, 1), num_images=3)
    assert_close(series[2:], draw(plain, "cat", seed=1), **EXACT)
    without_class = draw(pipeline, None, latents=torch.randn(2, 3, 8, 12), num_images=3)
    assert without_class.shape == (3, 3, 16, 24)


def test_numbers_beyond_float16_do_not_make_black_images():
    vae = make_autoencoder().to_diffusers()
    with torch.no_grad():  # a network of such size inside, and ordinary images
        vae.decoder.conv_in.weight *= 3e5
        vae.encoder.conv_in.weight *= 3e5
    pipeline = make_pipeline(DAEDiTImg2ImgPipeline, vae=vae)
    expected = draw(pipeline, "cat", picture(), strength=0.5)
    pipeline.vae.to(torch.float16)
    with pytest.warns(UserWarning, match="exceed the range of float16"):
        assert_close(draw(pipeline, "cat", picture(), strength=0.5), expected, atol=0.05, rtol=0)
    assert pipeline.vae.dtype == torch.float16


def test_slerp_keeps_the_norm_of_noise():
    first, last = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shares = torch.linspace(0, 1, 7)
    noise = slerp(first, last, shares)
    assert torch.equal(noise[0], first) and torch.equal(noise[-1], last)
    assert_close(noise.flatten(1).norm(dim=1), torch.lerp(first.norm(), last.norm(), shares))
    steps = torch.nn.functional.cosine_similarity(noise[1:].flatten(1), noise[:-1].flatten(1))
    assert_close(steps, steps[:1].expand(6), **EXACT)  # an even speed
    assert_close(slerp(first, first, shares), first.expand(7, -1, -1, -1), **EXACT)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 1}, "`num_images` is 1"),
        ({"num_images": 2.5}, "`num_images` is 2.5"),
        ({"class_labels": [0, 1, 0]}, "`class_labels` holds 3"),
        ({"generator": seeds(0, 1, 2)}, "`generator` holds 3"),
        ({"generator": [0, 1]}, "`generator` is 0, but must be"),
        ({"latents": torch.zeros(3, 3, 8, 8)}, "`latents` holds 3"),
        ({"num_images_per_prompt": 2}, "each call draws one series"),
        (
            {"prompt_embeds": torch.zeros(2, 1, 4)},
            "`prompt_embeds` holds 2 texts, but here embeddings are for all images",
        ),
    ],
)
def test_bad_series_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(DAEDiTInterpolationPipeline), **{"class_labels": "cat", **kwargs})


WITHOUT_OUR_PACKAGE = """
import sys
sys.modules["dae_diffusers"] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline

folder, image, mask, *again = sys.argv[1:]
images = {}
for place in (folder, *again):
    for kind in ("img2img", "inpaint", "interpolate"):
        code = f"{place}/dae_dit_{kind}.py" if place == folder else f"dae_dit_{kind}"
        pipe = DiffusionPipeline.from_pretrained(place, custom_pipeline=code, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        given = {"img2img": {"image": torch.load(image)}, "interpolate": {"num_images": 2}}
        given["inpaint"] = {**given["img2img"], "mask_image": torch.load(mask)}
        generator = torch.Generator().manual_seed(0)
        images[place, kind] = pipe("dog", generator=generator, num_inference_steps=2, output_type="pt", **given[kind]).images
        if place == folder:
            pipe.save_pretrained(f"again-{kind}")
torch.save(images, "again.pt")
"""


def test_pipelines_load_what_another_has_saved_with_our_package_and_with_diffusers_alone(tmp_path):
    image, mask = in_0_1(picture()), torch.zeros(16, 16)
    mask[:8] = 1
    given = {
        "img2img": {"image": image},
        "inpaint": {"image": image, "mask_image": mask},
        "interpolate": {"num_images": 2},
    }
    expected = {k: draw(make_pipeline(c), "dog", num_inference_steps=2, **given[k]) for k, c in KINDS.items()}
    make_pipeline().save_pretrained(tmp_path / "plain")
    for kind, pipeline_class in KINDS.items():
        loaded = pipeline_class.from_pretrained(tmp_path / "plain")
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(draw(loaded, "dog", num_inference_steps=2, **given[kind]), expected[kind])
        loaded.save_pretrained(tmp_path / kind)
        index, again = (DAEDiTPipeline.load_config(tmp_path / name) for name in ("plain", kind))
        assert {**again, "_name_or_path": None} == {**index, "_name_or_path": None}
        assert {path.name for path in (tmp_path / kind).iterdir()} == {
            path.name for path in (tmp_path / "plain").iterdir()
        }
    torch.save(image, tmp_path / "image.pt")
    torch.save(mask, tmp_path / "mask.pt")
    words = [str(tmp_path / name) for name in ("plain", "image.pt", "mask.pt", "again-img2img")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment["OMP_NUM_THREADS"] = "1"  # as here: sums of another order differ in the last bit
    subprocess.run([sys.executable, "-c", WITHOUT_OUR_PACKAGE, *words], check=True, env=environment, cwd=tmp_path)
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert all({path.name for path in (tmp_path / f"again-{kind}").iterdir()} == names for kind in KINDS)
    found = torch.load(tmp_path / "again.pt")
    assert len(found) == 6
    for (_, kind), images in found.items():
        assert torch.equal(images, expected[kind]), kind


def test_pipeline_files_need_torch_diffusers_and_each_other_alone():
    for module in (dae_dit_img2img, dae_dit_inpaint, dae_dit_interpolate):
        nodes = ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        ours = {name for name in names if name.startswith("dae_diffusers")}
        assert all(name.startswith("dae_diffusers.pipelines.dae_dit") for name in ours)
        assert {name.partition(".")[0] for name in names - ours} - sys.stdlib_module_names <= {"torch", "diffusers"}


def test_prompts_serve_in_the_place_of_classes(tmp_path):
    encoder = save_text_encoder(tmp_path)
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": None}
    transformer = DAEDiTTransformer2DModel(8, in_channels=3, cross_attention_dim=16, **sizes)
    for parameter in transformer.parameters():  # the attention to the text begins as zero
        torch.nn.init.normal_(parameter, std=0.2)
    texts = {"tokenizer": AutoTokenizer.from_pretrained(encoder), "text_encoder": AutoModel.from_pretrained(encoder)}
    vae = make_autoencoder().to_diffusers()
    plain = DAEDiTPipeline(transformer.eval(), vae.eval(), FlowMatchEulerDiscreteScheduler(), **texts)
    pipes = {kind: pipeline_class.from_pipe(plain) for kind, pipeline_class in KINDS.items()}
    for pipe in (plain, *pipes.values()):
        pipe.set_progress_bar_config(disable=True)
    image, options = in_0_1(picture()), {"negative_prompt": "blue"}
    drawn = draw(plain, "a red apple", **options)
    assert not torch.equal(drawn, draw(plain, "a cat", **options))
    assert torch.equal(draw(pipes["img2img"], "a red apple", image, 1.0, **options), drawn)
    assert draw(pipes["img2img"], "a cat", [image] * 2, 0.5, **options).shape == (2, 3, 16, 16)
    assert draw(pipes["img2img"], ["a cat", "a dog"], image, 0.5, num_images_per_prompt=2).shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match="3 images, but there are 2 labels or prompts"):
        draw(pipes["img2img"], ["a cat", "a dog"], [image] * 3)
    part = draw(pipes["inpaint"], "a cat", image, left_half())
    assert_close(part[..., 8:], image[..., 8:], atol=1e-6, rtol=0)
    series = draw(pipes["interpolate"], ("a red apple", "a dog"), generator=(*seeds(0, 1),), num_images=3, **options)
    assert_close(series[:1], drawn, **EXACT)
    assert_close(series[2:], draw(plain, "a dog", seed=1, **options), **EXACT)
