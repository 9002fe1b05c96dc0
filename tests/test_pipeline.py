import ast
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    VQModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from models import make_prior_pipeline
from torch.testing import assert_close

from dae_diffusers import DAEDiTImg2ImgPipeline, DAEDiTPipeline, DAEDiTTransformer2DModel, DAEVQGANPipeline
from dae_diffusers.pipelines import dae_dit

NAMES = {0: "tabby, tabby cat, pet", 1: "Crane", 2: "crane, hoist", 3: "dog, pet"}
TINY_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "mid_block_add_attention": False,
}


def make_vae(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**TINY_VAE, **config}).eval()


def make_transformer(**config) -> DAEDiTTransformer2DModel:
    torch.manual_seed(0)
    defaults = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4}
    transformer = DAEDiTTransformer2DModel(**{**defaults, **config})
    for module in (transformer.modulation, transformer.proj_out):
        torch.nn.init.normal_(module.weight, std=0.2)
    return transformer.eval()


def make_stock_transformer(**config) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    defaults = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    return DiTTransformer2DModel(**{**defaults, **config}).eval()


def make_pipeline(transformer=None, vae=None, scheduler=None, id2label=NAMES, **settings) -> DAEDiTPipeline:
    pipeline = DAEDiTPipeline(
        transformer=make_transformer() if transformer is None else transformer,
        vae=make_vae() if vae is None else vae,
        scheduler=FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler,
        id2label=id2label,
        **settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, class_labels=3, seed=0, num_inference_steps=2, output_type="pt", **kwargs) -> torch.Tensor:
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    kwargs.update(num_inference_steps=num_inference_steps, output_type=output_type)
    return pipeline(class_labels, **kwargs).images


def record_calls(pipeline) -> list[dict]:
    """What the transformer is asked from now on."""
    calls = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({"latents": args[0], **kwargs}), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_images_equal_those_of_diffusers_pipeline(out_channels, guidance_scale):
    components = {"transformer": make_stock_transformer(out_channels=out_channels), "vae": make_vae()}
    theirs = DiTPipeline(**components, scheduler=DDIMScheduler())
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        [1, 207], guidance_scale, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    images = sample(
        make_pipeline(**components, scheduler=DDIMScheduler()),
        [1, 207],
        guidance_scale=guidance_scale,
        num_inference_steps=4,
        output_type="np",
    )
    assert expected.std() > 0.01
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_one_guided_step_equals_its_formula():
    pipeline = make_pipeline()
    noise = torch.randn(1, 4, 8, 8)
    velocity = {
        label: pipeline.transformer(noise, torch.tensor(1000.0), torch.tensor([label])).sample for label in (3, 4)
    }
    guided = velocity[4] + 2.5 * (velocity[3] - velocity[4])
    latents = sample(pipeline, 3, latents=noise, guidance_scale=2.5, num_inference_steps=1, output_type="latent")
    assert_close(latents, noise - guided, atol=1e-5, rtol=1e-5)  # sigma falls from 1 to 0


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, DDPMScheduler])
def test_image_depends_on_its_own_generator_alone(scheduler):
    pipeline = make_pipeline(scheduler=scheduler(), is_flow_matching=scheduler is not DDPMScheduler)

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = sample(pipeline, [0, 3, "dog"], generator=generators(5, 6, 7), output_type="latent")
    other_company = sample(pipeline, [1, 3], generator=generators(8, 6), output_type="latent")
    alone = sample(pipeline, 3, generator=generators(6), output_type="latent")
    assert_close(together[1], other_company[1], atol=1e-5, rtol=1e-5)
    assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)
    assert (together[1] - together[2]).abs().max() > 0.1


def test_same_seed_gives_the_same_images():
    pipeline = make_pipeline()
    assert torch.equal(sample(pipeline, [0, 1]), sample(pipeline, [0, 1]))
    assert not torch.equal(sample(pipeline, [0, 1]), sample(pipeline, [0, 1], seed=1))


def test_guidance_of_one_never_doubles_the_batch():
    pipeline = make_pipeline()
    calls = record_calls(pipeline)
    sample(pipeline, [0, 1], guidance_scale=1.0)
    sample(pipeline, None, num_images_per_label=2, guidance_scale=4.0)
    assert [len(call["latents"]) for call in calls] == [2] * 4
    sample(pipeline, [0, 1], guidance_scale=4.0)
    assert [len(call["latents"]) for call in calls[4:]] == [4] * 2
    assert calls[4]["class_labels"].tolist() == [0, 1, 4, 4]


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDIMScheduler()])
def test_guidance_acts_within_its_interval_alone(scheduler):
    pipeline = make_pipeline(scheduler=scheduler, is_flow_matching=not isinstance(scheduler, DDIMScheduler))
    calls = record_calls(pipeline)
    sample(pipeline, num_inference_steps=10, guidance_interval=(0.3, 0.7))
    for call in calls:
        level = call["timestep"][0].item() / 1000
        assert len(call["latents"]) == (2 if 0.3 <= level <= 0.7 else 1), level
    assert len({len(call["latents"]) for call in calls}) == 2


def test_interval_without_a_step_equals_no_guidance():
    pipeline = make_pipeline()
    conditional = sample(pipeline, guidance_scale=1.0)
    assert torch.equal(sample(pipeline, guidance_scale=4.0, guidance_interval=(0.2, 0.3)), conditional)
    assert not torch.equal(sample(pipeline, guidance_scale=4.0), conditional)


def test_bounds_belong_to_the_guidance_interval():
    pipeline = make_pipeline(scheduler=DDIMScheduler(), is_flow_matching=False)
    calls = record_calls(pipeline)
    sample(pipeline, num_inference_steps=10, guidance_interval=(0.7, 0.7))  # DDIM stops at 700
    assert [len(call["latents"]) for call in calls] == [1, 1, 2] + [1] * 7


def test_no_label_is_the_null_class():
    pipeline = make_pipeline()
    assert pipeline.null_class == 4
    assert torch.equal(sample(pipeline, None), sample(pipeline, 4, guidance_scale=1.0))
    stock = make_pipeline(make_stock_transformer(num_embeds_ada_norm=10), scheduler=DDIMScheduler())
    assert stock.null_class == 10
    assert torch.equal(sample(stock, None), sample(stock, 10, guidance_scale=1.0))


def test_unconditional_model_takes_no_labels():
    pipeline = make_pipeline(make_transformer(num_classes=None), id2label=None)
    calls = record_calls(pipeline)
    assert sample(pipeline, None, num_images_per_label=3).shape == (3, 3, 16, 16)
    assert calls[0]["class_labels"] is None
    for label in (0, "dog", [0, 1]):
        with pytest.raises(ValueError, match="unconditional"):
            sample(pipeline, label)


def test_images_of_a_label_lie_next_to_each_other():
    pipeline = make_pipeline()
    calls = record_calls(pipeline)
    assert len(sample(pipeline, [2, "dog"], num_images_per_label=2, guidance_scale=1)) == 4
    assert calls[0]["class_labels"].tolist() == [2, 2, 3, 3]


NUMPY_IN_SCHEDULERS = "ignore:__array_:DeprecationWarning"  # diffusers' schedulers hand tensors to numpy
SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
# Of all that diffusers has, those that sample from velocities: without and with fresh noise in each step.
ODE_SAMPLERS = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
}
RANDOM_SAMPLERS = {"LTXEulerAncestralRFScheduler"}
FOR_DISTILLED = {"FlowMatchLCMScheduler"}


class TwoImages(DAEDiTTransformer2DModel):
    """The exact velocity toward a data set of two latents, `+1` and `-1` everywhere but for a ramp."""

    data = torch.stack((torch.ones(4, 8, 8), -torch.ones(4, 8, 8))) + torch.linspace(-0.5, 0.5, 8)

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        sigma = (timestep.double() / 1000).view(-1, 1, 1, 1)
        distances = (hidden_states.double()[:, None] - (1 - sigma[:, None]) * self.data).square().flatten(2).sum(-1)
        weights = (-distances / (2 * sigma.flatten()[:, None].clamp(min=1e-6) ** 2)).softmax(dim=1)  # (B, 2)
        expected = torch.einsum("bn,nchw->bchw", weights, self.data.double())
        return Transformer2DModelOutput(((hidden_states - expected) / sigma.clamp(min=1e-6)).float())


def make_exact_pipeline() -> DAEDiTPipeline:
    transformer = TwoImages(8, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=4)
    return make_pipeline(transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.fixture(scope="module")
def exact():
    """A pipeline, and its latents by Euler's method in small steps."""
    pipeline = make_exact_pipeline()
    return pipeline, sample(pipeline, None, num_images_per_label=4, num_inference_steps=400, output_type="latent")


def made_of(name: str, config, **options):
    """A scheduler as users make it: from the config of another one."""
    try:
        return getattr(diffusers, name).from_config(config, **options)
    except (TypeError, ImportError):  # of schedulers that need more, or another package
        return None


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
def test_every_scheduler_of_diffusers_draws_the_same_images_or_is_refused_by_name(exact):
    pipeline, expected = exact
    euler, accepted, warned = pipeline.scheduler, set(), set()
    for name in SCHEDULERS:
        scheduler = made_of(name, euler.config)
        if scheduler is None:
            continue
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                pipeline.scheduler = scheduler
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error)
            assert "FlowMatchEulerDiscreteScheduler" in str(error) and "UniPCMultistepScheduler" in str(error)
            assert pipeline.scheduler is not scheduler
            continue
        accepted.add(name)
        warned |= {name for each in caught if "distilled" in str(each.message)}
        latents = sample(pipeline, None, num_images_per_label=4, num_inference_steps=50, output_type="latent")
        if name in ODE_SAMPLERS:
            assert (latents - expected).abs().max() < 0.02, name
        else:  # another of the two images, perhaps
            assert (latents[:, None] - TwoImages.data).abs().amax((2, 3, 4)).amin(1).max() < 0.02, name
    pipeline.scheduler = euler
    assert accepted == (ODE_SAMPLERS | RANDOM_SAMPLERS | FOR_DISTILLED) & set(SCHEDULERS)
    assert warned == FOR_DISTILLED & set(SCHEDULERS)


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
@pytest.mark.parametrize(
    ("name", "options", "is_right"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, True),  # would leave noise: set up anew
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, True),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, True),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, False),  # not a number, in diffusers
        ("UniPCMultistepScheduler", {"thresholding": True}, False),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 40.0}, True),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, True),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, False),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 500}, False),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, False),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, False),
        ("SASolverScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, False),
    ],
)
def test_options_of_a_scheduler_draw_the_images_or_are_refused(exact, name, options, is_right):
    pipeline, _ = exact
    euler = pipeline.scheduler
    scheduler = made_of(name, euler.config, **options)
    if not is_right:
        with pytest.raises(ValueError, match=f"{name} .*would ruin the images"):
            pipeline.scheduler = scheduler
        return
    pipeline.scheduler = scheduler
    latents = sample(pipeline, None, num_images_per_label=4, num_inference_steps=50, output_type="latent")
    pipeline.scheduler = euler
    assert (latents[:, None] - TwoImages.data).abs().amax((2, 3, 4)).amin(1).max() < 0.02


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
def test_solver_keeps_the_shift_of_the_scheduler_it_comes_from_and_what_it_was_told():
    pipeline = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    solver = made_of("UniPCMultistepScheduler", pipeline.scheduler.config, solver_order=3)
    for shift, scheduler in (
        (3.0, solver),
        (5.0, diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5)),
    ):
        pipeline.scheduler = scheduler
        assert pipeline.scheduler.config.flow_shift == shift and pipeline.scheduler.config.use_flow_sigmas
    assert solver.config.solver_order == 3
    assert pipeline.scheduler is scheduler  # right as it was
    for given, shift in (({}, 5.0), ({"shift": 1.0}, 1.0)):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **given)
        assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler and pipeline.scheduler.config.shift == shift


def test_averaging_scheduler_is_warned_of():
    with pytest.warns(UserWarning, match="distilled"):
        make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_transformer_trained_for_diffusion_has_the_schedulers_of_diffusion(name, tmp_path):
    """What predicts noise is known by the scheduler it comes with, or said; it then holds for every later one."""
    for make in (make_stock_transformer, make_transformer):
        told = {} if make is make_stock_transformer else {"is_flow_matching": False}
        pipeline = DAEDiTPipeline(make(out_channels=8), make_vae(), DDIMScheduler(), **told)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        assert pipeline.scheduler.config.prediction_type == "epsilon"
        latents = sample(pipeline, [0, 1], num_inference_steps=4, output_type="latent")
        assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()
        pipeline.save_pretrained(tmp_path / make.__name__)
        for other in (pipeline, DAEDiTPipeline(**pipeline.components)):
            with pytest.raises(ValueError, match="trained for diffusion"):
                other.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
            for edm in (diffusers.EDMEulerScheduler(), diffusers.EDMDPMSolverMultistepScheduler()):
                with pytest.raises(ValueError, match=f"{type(edm).__name__}, whose timesteps are not those"):
                    other.scheduler = edm
            for wrong, reason in (
                ("DDIMInverse", "which goes from images to noise"),
                ("RePaint", "original_image, mask"),
            ):
                with pytest.raises(ValueError, match=f"{wrong}Scheduler, .*{reason}: it cannot draw here"):
                    other.scheduler = getattr(diffusers, f"{wrong}Scheduler")()
        with pytest.raises(ValueError, match="trained for diffusion"):
            DAEDiTPipeline.from_pretrained(tmp_path / make.__name__, scheduler=FlowMatchEulerDiscreteScheduler())


def test_scheduler_given_while_loading_is_one_for_the_model(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDIMScheduler which cannot sample"):
        DAEDiTPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler())
    stock = make_pipeline(make_stock_transformer())  # of flow matching, as its scheduler says
    with pytest.raises(ValueError, match="DDIMScheduler which cannot sample"):
        stock.scheduler = DDIMScheduler()


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
def test_scheduler_that_knows_its_first_sigma_gets_noise_of_that_size():
    pipeline = make_pipeline(scheduler=diffusers.EulerDiscreteScheduler(), is_flow_matching=False)
    calls, noise = record_calls(pipeline), torch.randn(1, 4, 8, 8)
    sample(pipeline, latents=noise, guidance_scale=1)
    first_sigma = pipeline.scheduler.sigmas[0]
    assert first_sigma > 10
    assert_close(calls[0]["latents"], noise * pipeline.scheduler.init_noise_sigma / (first_sigma**2 + 1).sqrt())


def test_variance_reaches_the_scheduler_that_learned_it():
    transformer, outputs, noise = make_stock_transformer(out_channels=8), [], torch.randn(1, 4, 8, 8)
    for variance_type in ("fixed_small", "learned_range"):
        pipeline = make_pipeline(transformer, scheduler=DDPMScheduler(variance_type=variance_type))
        step = pipeline.scheduler.step
        pipeline.scheduler.step = lambda output, *args, step=step, **kwargs: (
            outputs.append(output) or step(output, *args, **kwargs)
        )
        sample(pipeline, 3, latents=noise, num_inference_steps=1, output_type="latent")
    timestep = pipeline.scheduler.timesteps[:1]
    with torch.no_grad():
        variance = transformer(noise, timestep=timestep, class_labels=torch.tensor([3])).sample[:, 4:]  # unguided
    assert_close(outputs[1], torch.cat((outputs[0], variance), dim=1), atol=1e-5, rtol=1e-5)


def test_models_keep_their_dtypes_and_latents_stay_in_float32():
    pipeline = make_pipeline(make_transformer().to(torch.bfloat16), make_vae().to(torch.float16))
    calls = record_calls(pipeline)
    latents = sample(pipeline, output_type="latent")
    assert calls[0]["latents"].dtype == torch.bfloat16
    assert_close(latents, sample(make_pipeline(), output_type="latent"), atol=0.1, rtol=0.1)
    assert sample(pipeline).dtype == torch.float16
    predicts_zero = DAEDiTTransformer2DModel(8, num_layers=1, num_classes=4).to(torch.bfloat16)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(make_pipeline(predicts_zero), output_type="latent"), noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(sample(make_pipeline()).float(), sample(make_pipeline()).float(), atol=0.1, rtol=0)


def test_callback_sees_and_changes_every_step():
    pipeline, steps = make_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._guidance_scale = 1.0
        return {"latents": torch.full_like(tensors["latents"], float(step))}

    calls = record_calls(pipeline)
    latents = sample(pipeline, num_inference_steps=3, output_type="latent", callback_on_step_end=callback)
    assert steps == [0, 1, 2]
    assert pipeline.num_timesteps == 3
    assert [len(call["latents"]) for call in calls] == [2, 1, 1]
    assert torch.equal(latents, torch.full_like(latents, 2))
    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": None}
    assert torch.equal(sample(make_pipeline(), num_inference_steps=3, output_type="latent", **given), latents)


@pytest.mark.parametrize("size", [(16, 24), (8, 16)])
def test_images_may_be_rectangular(size):
    assert sample(make_pipeline(), height=size[0], width=size[1]).shape == (1, 3, *size)


def test_default_size_is_the_one_trained_on():
    assert sample(make_pipeline(make_transformer(sample_size=[4, 6]))).shape == (1, 3, 8, 12)


def test_given_latents_choose_the_size():
    noise = torch.randn(2, 4, 4, 6)
    images = sample(make_pipeline(), [0, 1], latents=noise)
    assert images.shape == (2, 3, 8, 12)
    assert torch.equal(images, sample(make_pipeline(), [0, 1], latents=noise, height=8, width=12, seed=9))


def test_latent_output_decodes_to_the_image():
    pipeline = make_pipeline()
    latents = sample(pipeline, output_type="latent")
    expected = (pipeline.decode_latents(latents) * 0.5 + 0.5).clamp(0, 1)
    assert torch.equal(sample(pipeline), expected)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_image_has_the_mode_of_its_channels(channels, mode):
    pipeline = make_pipeline(vae=make_vae(in_channels=channels, out_channels=channels))
    (image,) = sample(pipeline, output_type="pil")
    assert (image.mode, image.size) == (mode, (16, 16))
    exact = sample(pipeline, output_type="np")
    assert np.array_equal(np.asarray(image).reshape(16, 16, channels), (exact[0] * 255).round())


def test_other_channel_counts_are_arrays_alone():
    pipeline = make_pipeline(vae=make_vae(in_channels=5, out_channels=5))
    assert sample(pipeline, output_type="np").shape == (1, 16, 16, 5)
    assert np.array_equal(sample(pipeline, output_type="numpy"), sample(pipeline, output_type="np"))
    with pytest.raises(ValueError, match="5 channels"):
        sample(pipeline, output_type="pil")


def test_tuple_is_returned_when_asked_for():
    pipeline = make_pipeline()
    (images,) = pipeline(3, num_inference_steps=1, return_dict=False)
    assert images[0].size == (16, 16)


def test_statistics_are_undone_before_decoding():
    mean, std = [0.1, -2.0, 3.0, 0.0], [1.0, 2.0, 0.5, 4.0]
    latents = torch.randn(2, 4, 8, 8)
    vae = make_vae(latents_mean=mean, latents_std=std, scaling_factor=0.5, shift_factor=7.0)
    raw = latents * torch.tensor(std).view(4, 1, 1) / 0.5 + torch.tensor(mean).view(4, 1, 1)
    with torch.no_grad():
        assert_close(make_pipeline(vae=vae).decode_latents(latents), vae.decode(raw).sample)


def test_scale_and_shift_are_undone_without_statistics():
    latents = torch.randn(2, 4, 8, 8)
    vae = make_vae(scaling_factor=0.5, shift_factor=7.0)
    with torch.no_grad():
        assert_close(make_pipeline(vae=vae).decode_latents(latents), vae.decode(latents / 0.5 + 7).sample)


def test_vq_model_quantises_what_it_decodes():
    vq_model = VQModel(**{**TINY_VAE, "latent_channels": 4}, num_vq_embeddings=16, scaling_factor=0.5).eval()
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vq_model.decode(latents / 0.5).sample
    pipeline = make_pipeline(vae=vq_model)
    assert_close(pipeline.decode_latents(latents), expected)
    assert sample(pipeline).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("statistics", [{"latents_mean": [0.0] * 4}, {"latents_mean": [0.0], "latents_std": [1.0]}])
def test_incomplete_statistics_are_named(statistics):
    with pytest.raises(ValueError, match="latents have 4 channels"):
        make_pipeline(vae=make_vae(**statistics)).decode_latents(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ("dog", [3]),
        (" DOG ", [3]),
        (["tabby cat", 2, "Tabby"], [0, 2, 0]),
        ("tabby, tabby cat, pet", [0]),
        ("CRANE", [1]),  # the whole entry comes before one of several names
        ("Crane", [1]),  # as written, though another class is called `crane`
        ("crane", [2]),
        (["hoist", "dog"], [2, 3]),
        ([[1], [0, "dog"]], [1, 0, 3]),
        (torch.tensor([3, 1]), [3, 1]),
        (np.int64(2), [2]),
        (range(2), [0, 1]),
    ],
)
def test_labels_are_ids_or_names(labels, ids):
    assert make_pipeline().get_label_ids(labels) == ids


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("dgo", "`dgo` is not one of the 4 classes. Nearest: dog"),
        ("pet", r"names 2 classes: 0 \(tabby, tabby cat, pet\); 3 \(dog, pet\)"),
        (5, "Class 5 is out of range: there are 4 classes"),
        (-1, "Class -1 is out of range"),
        ([], "empty"),
        ([0, None], "`None` is no class"),
        (1.0, "`1.0` is no class"),
        (torch.tensor(1.0), r"`1.0` is no class"),
        ({"shape": 1}, "`class_labels` has `shape`, but this pipeline has one kind of classes"),
    ],
)
def test_bad_label_is_named(labels, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(labels)


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"a": 0}, r"`id2label` has 'a', but maps ids to names"),
        ({0: 7}, r"`id2label` has the name 7, but names are texts"),
        ({9: "a"}, "names class 9, but the transformer has 4"),
    ],
)
def test_bad_names_of_classes_are_refused(id2label, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(id2label=id2label)
    assert make_pipeline(id2label=["a", "b"]).id2label == {0: "a", 1: "b"}  # as `ClassLabel.names` has them


def test_names_need_id2label():
    with pytest.raises(ValueError, match="no `id2label`"):
        make_pipeline(id2label=None)("dog")


def test_labels_list_every_name_as_in_diffusers():
    assert make_pipeline().labels == DiTPipeline(make_stock_transformer(), make_vae(), DDIMScheduler(), NAMES).labels


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 18}, "`height` is 18, but must be a multiple of 4 .* Nearest: 16 and 20"),
        ({"width": 2}, "Nearest: 4 and 8"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"ask for \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"ask for \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(4, 8, 8)}, r"ask for \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 4, 4), "height": 16}, r"ask for \(1, 4, 8, 4\)"),
        ({"generator": [torch.Generator()] * 2}, "2 generators, but 1 images"),
        ({"generator": 5}, "`generator` is 5, but must be a `torch.Generator`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"latents": "noise"}, "`latents` has shape"),
        ({"guidance_interval": (0.7, 0.3)}, "0 <= low <= high <= 1"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": 3.0}, "`num_inference_steps` is 3.0, but must be a whole number"),
        ({"num_images_per_label": 0}, "`num_images_per_label` is 0"),
        ({"height": 16.0}, "`height` is 16.0, but must be a whole number"),
        ({"guidance_interval": 0.5}, "`guidance_interval` is 0.5, but must be two noise levels"),
        ({"guidance_scale": "2"}, "`guidance_scale` is '2'"),
        ({"output_type": "jpg"}, "pil, np, numpy, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]"),
    ],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(make_pipeline(), **kwargs)


def test_stock_transformer_does_squares_alone():
    pipeline = make_pipeline(make_stock_transformer(), scheduler=DDIMScheduler())
    assert sample(pipeline, height=24, width=24).shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="makes only square images. Use 16 x 16"):
        sample(pipeline, height=16, width=24)


def test_transformer_and_autoencoder_must_share_their_channels():
    with pytest.raises(ValueError, match="8 latent channels and the autoencoder 4"):
        make_pipeline(make_transformer(in_channels=8))


def test_saved_pipeline_returns_with_the_installed_class(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = DAEDiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is DAEDiTTransformer2DModel
    assert loaded.id2label == NAMES
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, "dog"), sample(pipeline, "dog"))
    assert loaded.name_or_path == str(tmp_path)


def test_pipelines_of_the_same_parts_know_the_names():
    pipeline = make_pipeline(value_range=[0.0, 4.0])
    expected = sample(pipeline, "dog")
    for again in (DAEDiTPipeline(**pipeline.components), DAEDiTPipeline.from_pipe(pipeline)):
        again.set_progress_bar_config(disable=True)
        assert (again.id2label, again.value_range) == (NAMES, [0.0, 4.0])
        assert torch.equal(sample(again, "dog"), expected)
    for parts in ({"vae": make_vae()}, {}):  # the range is the autoencoder's
        again = DAEDiTPipeline.from_pipe(pipeline, **parts)
        assert again.value_range == DAEDiTPipeline(**pipeline.components | parts).value_range
        assert again.value_range == (None if parts else [0.0, 4.0])
    with pytest.raises(ValueError, match="names class 9"):
        DAEDiTPipeline(**pipeline.components, id2label={9: "none such"})
    assert DAEDiTPipeline(**pipeline.components).id2label == NAMES
    assert DAEDiTPipeline(**pipeline.components, id2label={}).id2label == {}
    stock = DiTPipeline(make_stock_transformer(), make_vae(), DDIMScheduler(), NAMES)
    assert DAEDiTPipeline.from_pipe(stock).labels == stock.labels
    assert DAEDiTPipeline.from_pipe(stock).is_flow_matching is False


def test_numbers_that_are_not_finite_are_said():
    pipeline = make_pipeline()
    with torch.no_grad():
        next(pipeline.transformer.parameters()).fill_(math.nan)
    with pytest.warns(UserWarning, match="the transformer has drawn numbers that are not finite"):
        sample(pipeline, 0, num_inference_steps=1, output_type="latent")
    for scale in (torch.tensor([1.0, 2.0]), math.nan, "2"):
        with pytest.raises(ValueError, match="must be a finite number; 1 turns guidance off"):
            pipeline(0, guidance_scale=scale)


def test_pipelines_made_of_another_leave_its_models_as_they_are():
    pipeline = make_pipeline().to(torch.bfloat16)
    made = DAEDiTImg2ImgPipeline.from_pipe(pipeline)
    assert made.transformer is pipeline.transformer and made.vae.dtype == pipeline.transformer.dtype == torch.bfloat16
    assert made.id2label == NAMES
    assert DAEDiTPipeline.from_pipe(made, dtype=torch.float32).transformer.dtype == torch.float32
    DAEDiTPipeline(**pipeline.components, id2label={0: "another"})  # of the same models
    assert DAEDiTImg2ImgPipeline.from_pipe(pipeline).id2label == NAMES
    codes = make_prior_pipeline().to(torch.bfloat16)
    assert DAEVQGANPipeline.from_pipe(codes).prior.dtype == torch.bfloat16


def test_a_callback_may_end_a_call_and_those_of_diffusers_say_what_they_read():
    pipeline, steps = make_pipeline(), []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    images = sample(pipeline, num_inference_steps=6, callback_on_step_end=stop)
    assert steps == [0, 1] and images.isfinite().all()
    assert torch.equal(sample(pipeline), sample(make_pipeline()))  # the next call goes to its end
    with pytest.raises(ValueError, match=r"has \['prompt_embeds'\], but must be out of \['latents'\]"):
        sample(pipeline, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))


def test_another_autoencoder_brings_its_size():
    pipeline = make_pipeline()
    pipeline.vae = make_vae(**{name: (kind[0],) * 3 for name, kind in TINY_VAE.items() if isinstance(kind, tuple)})
    assert sample(pipeline).shape[-1] == 32 and sample(pipeline, height=16, width=16).shape[-1] == 16
    with pytest.raises(ValueError, match="4 latent channels and the autoencoder 3"):
        pipeline.vae = make_vae(latent_channels=3)
    assert pipeline.vae_scale_factor == 4
    with pytest.raises(ValueError, match="but must be a scheduler of diffusers, made"):
        pipeline.scheduler = DDIMScheduler


def test_transformers_that_diffusers_cannot_save_are_refused(tmp_path):
    pipeline = make_pipeline()

    class Wrapped(torch.nn.Module):  # as PEFT does
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

    pipeline.transformer = Wrapped(pipeline.transformer)
    with pytest.raises(ValueError, match=r"`transformer` is a Wrapped, .* pipe.transformer.merge_and_unload\(\)"):
        pipeline.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_pipelines_keep_how_they_draw_by_default(tmp_path):
    pipeline = make_pipeline(default_guidance_scale=1.5, default_num_inference_steps=3)
    all_levels = {"guidance_interval": (0, 1), "velocity_scale": 1}
    assert pipeline.call_defaults == {"guidance_scale": 1.5, "num_inference_steps": 3, **all_levels}
    expected = sample(pipeline, **pipeline.call_defaults)
    pipeline.save_pretrained(tmp_path)
    again = [DAEDiTPipeline(**pipeline.components), DAEDiTPipeline.from_pretrained(tmp_path)]
    for each in (pipeline, *again):
        each.set_progress_bar_config(disable=True)
        assert torch.equal(each(3, output_type="pt", generator=torch.Generator().manual_seed(0)).images, expected)
    calls = record_calls(plain := make_pipeline())
    plain(3)
    assert len(calls) == 50  # if the pipeline says nothing


@pytest.mark.parametrize("options", [{}, {"custom_pipeline": True}, {"max_memory": {0: 1}}])
def test_parts_are_spread_over_devices(tmp_path, monkeypatch, options):
    """Without a GPU `balanced` leaves all on the CPU; a GPU of one byte makes diffusers say so."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr("diffusers.pipelines.pipeline_loading_utils.get_max_memory", lambda given: given or {})
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    if "custom_pipeline" in options:
        options = {"custom_pipeline": str(tmp_path / "saved")}
    loaded = DAEDiTPipeline.from_pretrained(
        tmp_path / "saved", device_map="balanced", trust_remote_code=True, **options
    )
    assert type(loaded.transformer) is DAEDiTTransformer2DModel
    assert loaded.id2label == NAMES
    assert (loaded.hf_device_map or {"transformer": "cpu"}) == {"transformer": "cpu"}
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, "dog"), sample(pipeline, "dog"))


def test_saved_stock_pipeline_is_one_for_diffusers_too(tmp_path):
    pipeline = make_pipeline(make_stock_transformer(out_channels=8), scheduler=DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    assert not list((tmp_path / "transformer").glob("*.py"))
    theirs = DiTPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.labels == pipeline.labels
    expected = theirs([3], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images
    assert_close(sample(DAEDiTPipeline.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=0)


def test_loading_options_reach_the_transformer(tmp_path):
    make_pipeline().save_pretrained(tmp_path, variant="fp16")
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    loaded = DAEDiTPipeline.from_pretrained(tmp_path, variant="fp16", dtype=dtypes)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float16)
    make_pipeline().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="variant=fp16"):
        DAEDiTPipeline.from_pretrained(tmp_path / "plain", variant="fp16")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere` is neither a folder nor a Hub repository"):
        DAEDiTPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="holds no pipeline: neither it nor its sub-folder `pipeline` has a `model_index.json`"
    ):
        DAEDiTPipeline.from_pretrained(tmp_path)


def test_decoupled_autoencoder_is_not_saved_as_it_is(autoencoder, tmp_path):
    pipeline = make_pipeline(make_transformer(in_channels=3), autoencoder)
    with pytest.raises(ValueError, match="pipe.vae.to_diffusers()"):
        pipeline.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    pipeline.vae = pipeline.vae.to_diffusers()
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert type(DAEDiTPipeline.from_pretrained(tmp_path / "pipeline").vae) is AutoencoderKL


WITHOUT_OUR_PACKAGE = """
import sys
sys.modules["dae_diffusers"] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("dog", generator=generator, num_inference_steps=2, output_type="pt").images

folder, again, codes, result = sys.argv[1:]
images, modules = [], []
for target in (folder, again):
    pipe = DiffusionPipeline.from_pretrained(target, custom_pipeline=target, trust_remote_code=True)
    images.append(sample(pipe))
    modules.append(type(pipe.transformer).__module__)
    pipe.save_pretrained(again)

DiffusionPipeline.from_pretrained(codes, custom_pipeline=codes, trust_remote_code=True)
pipe.save_pretrained(again)  # its own code, although that of `codes` now lies where its code lay

del sys.modules["dae_diffusers"]
from dae_diffusers import DAEDiTPipeline
pipe = DAEDiTPipeline.from_pretrained(again)
images.append(sample(pipe))
modules.append(type(pipe.transformer).__module__)
torch.save({"images": torch.stack(images), "modules": modules, "ids": list(pipe.id2label)}, result)
"""


def test_saved_pipeline_runs_elsewhere_with_diffusers_alone_and_with_our_package(tmp_path):
    pipeline = make_pipeline()
    folder, again, codes, result = (str(tmp_path / name) for name in ("folder", "again", "codes", "result.pt"))
    pipeline.save_pretrained(folder)
    make_prior_pipeline().save_pretrained(codes)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_OUR_PACKAGE, folder, again, codes, result],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    result = torch.load(result, weights_only=True)
    for images in result["images"]:
        assert torch.equal(images, sample(pipeline, "dog"))
    assert [module.partition(".")[0] for module in result["modules"]] == ["diffusers_modules"] * 2 + ["dae_diffusers"]
    assert result["ids"] == [0, 1, 2, 3]
    files = [{path.name: path.read_text() for path in Path(each).glob("*.py")} for each in (folder, again)]
    assert files[0] == files[1] and len(files[0]) == 4


def test_pipeline_file_needs_torch_and_diffusers_alone():
    with open(dae_dit.__file__, encoding="utf-8") as file:
        nodes = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name if isinstance(node, ast.Import) else node.module for node in nodes for alias in node.names}
    assert {module.partition(".")[0] for module in modules} - sys.stdlib_module_names == {"torch", "diffusers"}


def test_many_steps_at_high_noise_levels_end():
    """Timesteps are whole numbers for the solver, so that the first may stand there twice."""
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5)
    images = sample(make_pipeline(scheduler=scheduler), num_inference_steps=250, guidance_scale=1)
    assert images.isfinite().all()


def test_images_that_are_no_squares_are_decoded_in_tiles():
    whole = make_pipeline(make_transformer(sample_size=(8, 16)), make_vae(sample_size=[16, 32]))
    latents = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = whole.decode_latents(latents)
    whole.vae.enable_tiling()
    found = whole.decode_latents(latents)
    assert found.shape == expected.shape and 0 < (found - expected).abs().mean() < expected.std()


def test_velocity_and_interval_of_guidance_are_those_of_the_call_or_the_default(tmp_path):
    pipeline = make_pipeline()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def drawn(pipeline, **options) -> torch.Tensor:
        """One step of Euler, which is linear in the velocity."""
        options = {"latents": noise, "num_inference_steps": 1, "output_type": "latent", "guidance_scale": 2} | options
        return sample(pipeline, **options)

    plain = drawn(pipeline)
    torch.testing.assert_close(drawn(pipeline, velocity_scale=1.5) - noise, 1.5 * (plain - noise))
    assert torch.equal(drawn(pipeline, velocity_scale=1), plain)
    make_pipeline(default_velocity_scale=1.5).save_pretrained(tmp_path)
    saved = DAEDiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(drawn(saved), drawn(pipeline, velocity_scale=1.5))
    for wrong in (0, "much", float("nan")):
        with pytest.raises(ValueError, match="`velocity_scale` is .*, but must be a number above 0"):
            drawn(pipeline, velocity_scale=wrong)
    make_pipeline(default_guidance_interval=(0.2, 0.3)).save_pretrained(tmp_path)
    saved, options = DAEDiTPipeline.from_pretrained(tmp_path), {"guidance_scale": 4, "num_inference_steps": 4}
    assert saved.config.default_guidance_interval == [0.2, 0.3]
    assert torch.equal(sample(saved, **options), sample(saved, **options, guidance_interval=(0.2, 0.3)))
    assert not torch.equal(sample(saved, **options), sample(saved, **options, guidance_interval=(0, 1)))
    with pytest.raises(ValueError, match="`velocity_scale` is for flow matching"):
        drawn(make_pipeline(scheduler=diffusers.DDIMScheduler(), is_flow_matching=False), velocity_scale=1.1)
