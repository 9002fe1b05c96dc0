"""Drawing codes: the same with and without cache, by each image's own generator, of the class that was asked for."""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, VQModel
from models import NUM_CODES, PRIOR_NAMES, make_plain_vq_model, make_prior, make_prior_pipeline, make_vq_model

from dae_diffusers import DAEVQGANPipeline
from dae_diffusers.pipelines.dae_vqgan import _draw_codes, code_fingerprint
from dae_diffusers.weights import autoencoder_fingerprint


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipeline, labels, generator=None, **kwargs) -> torch.Tensor:
    return pipeline(labels, generator=generator or generators(0)[0], output_type="codes", **kwargs).images


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_cache_changes_no_code(guidance_scale):
    pipeline = make_prior_pipeline()
    codes = [
        draw(pipeline, [0, 1, 2, 0], generators(*range(4)), guidance_scale=guidance_scale, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*codes)
    assert len(codes[0].unique()) > 4


def test_pipeline_keeps_its_guidance(tmp_path):
    pipeline = make_prior_pipeline()
    default, guided, plain = (
        draw(pipeline, [0, 1, 2] * 4, **given) for given in ({}, {"guidance_scale": 2}, {"guidance_scale": 1})
    )
    assert torch.equal(default, guided) and not torch.equal(default, plain)
    assert pipeline.call_defaults == {"guidance_scale": 2, "temperature": 1, "top_k": None, "top_p": None}
    DAEVQGANPipeline(pipeline.prior, pipeline.vae, default_guidance_scale=1.0).save_pretrained(tmp_path)
    pipeline = DAEVQGANPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipeline, [0, 1, 2] * 4), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_likeliest_codes_are_those_of_the_guided_logits(guidance_scale):
    pipeline = make_prior_pipeline()
    codes = draw(pipeline, 1, guidance_scale=guidance_scale, top_k=1).flatten()

    def logits(label):
        tokens = torch.cat((torch.tensor([NUM_CODES + label]), codes[:-1]))
        return pipeline.prior(input_ids=tokens[None], use_cache=False).logits[0, :, :NUM_CODES]

    with torch.no_grad():
        guided = logits(3) + guidance_scale * (logits(1) - logits(3))
    assert torch.equal(guided.argmax(dim=1), codes)


def test_image_depends_on_its_own_generator_and_label_alone():
    pipeline = make_prior_pipeline()
    together = draw(pipeline, [0, 1, 2], generators(5, 6, 7))
    assert torch.equal(draw(pipeline, [2, 1], generators(7, 6)), together[[2, 1]])
    assert torch.equal(draw(pipeline, [0, 1]), draw(pipeline, [0, 1]))
    assert not torch.equal(draw(pipeline, 0, generators(1)), draw(pipeline, 0, generators(2)))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125]).log()
    uniform = (torch.arange(8000) + 0.5) / 8000
    counts = torch.bincount(_draw_codes(logits.expand(8000, 4), uniform, None, None), minlength=4)
    torch.testing.assert_close(counts / 8000, logits.exp(), atol=2e-3, rtol=0)
    for options, kept in (
        ((2, None), [0.5, 0, 0.25, 0]),
        ((None, 0.6), [0.5, 0, 0.25, 0]),
        ((None, 0.4), [1, 0, 0, 0]),
    ):
        counts = torch.bincount(_draw_codes(logits.expand(8000, 4), uniform, *options), minlength=4)
        torch.testing.assert_close(counts / 8000, torch.tensor(kept) / sum(kept), atol=2e-3, rtol=0)


def test_draw_at_the_very_end_is_an_allowed_code():
    logits = torch.tensor([[0.0, -1.0, 5.0, 1.0]])
    for top_k, code in ((1, 2), (2, 3), (4, 1)):
        assert _draw_codes(logits, torch.tensor([1.0]), top_k, None).item() == code


def test_low_temperature_draws_the_likeliest_codes():
    pipeline = make_prior_pipeline()
    assert torch.equal(draw(pipeline, 1, temperature=1e-6), draw(pipeline, 1, top_k=1))


def test_codes_decode_to_the_image():
    pipeline = make_prior_pipeline(grid_size=(4, 6))
    codes = draw(pipeline, [0, 1])
    images = pipeline([0, 1], generator=generators(0)[0], output_type="pt").images
    assert images.shape == (2, 3, 8, 12)
    with torch.no_grad():
        entries = pipeline.vae.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
        expected = pipeline.vae.decode(entries, force_not_quantize=True).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    pipeline.vae.register_to_config(lookup_from_codebook=True)
    torch.testing.assert_close(pipeline.decode_codes(codes), expected)


def test_labels_are_ids_or_names_and_images_of_a_label_lie_together():
    pipeline = make_prior_pipeline()
    assert pipeline.get_label_ids(["cat", 2, "Crane", "hoist", "TABBY, cat"]) == [0, 2, 1, 2, 0]
    assert draw(pipeline, ["cat", 1], num_images_per_label=2).shape == (4, 4, 4)
    assert pipeline.labels == {"Crane": 1, "bird": 1, "cat": 0, "crane": 2, "hoist": 2, "tabby": 0}
    assert pipeline("cat").images[0].size == (8, 8)


def test_no_label_is_the_null_class():
    pipeline = make_prior_pipeline()
    assert torch.equal(draw(pipeline, None), draw(pipeline, 3, guidance_scale=1.0))


def test_arguments_of_other_pipelines_mean_the_same():
    pipeline = make_prior_pipeline()
    assert torch.equal(draw(pipeline, 0, guidance_scale=None), draw(pipeline, 0, guidance_scale=2.0))
    same = (draw(pipeline, 0, **{name: 2}) for name in ("num_images_per_prompt", "num_images_per_label"))
    assert torch.equal(*same)


def test_unconditional_model_takes_no_labels():
    pipeline = make_prior_pipeline(num_classes=0, id2label=None)
    assert draw(pipeline, None, num_images_per_label=3).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="unconditional"):
        pipeline(0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": "dog"}, "`dog` is not one of the 3 classes. Nearest: "),
        ({"class_labels": "CRANE"}, "names 2 classes"),
        ({"class_labels": 4}, "out of range"),
        ({"class_labels": []}, "empty"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_k": 0}, "at least 1"),
        ({"top_k": 2.5}, "`top_k` is 2.5, but must be a whole number"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"class_labels": torch.tensor(1.0)}, "is no class"),
        ({"top_p": 1.5}, "at most 1"),
        ({"num_images_per_label": 0}, "at least 1"),
        ({"output_type": "jpg"}, "one of"),
        ({"generator": generators(1, 2)}, "2 generators, but 1 images"),
    ],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_prior_pipeline()(**{"class_labels": 0, **kwargs})


def test_pipelines_of_the_same_parts_know_the_names():
    pipeline = make_prior_pipeline()
    pipeline = DAEVQGANPipeline(pipeline.prior, pipeline.vae, PRIOR_NAMES, value_range=[0.0, 4.0])
    for again in (DAEVQGANPipeline(**pipeline.components), DAEVQGANPipeline.from_pipe(pipeline)):
        again.set_progress_bar_config(disable=True)
        assert (again.id2label, again.value_range) == (PRIOR_NAMES, [0.0, 4.0])
        assert torch.equal(draw(again, "cat"), draw(pipeline, 0))
    assert DAEVQGANPipeline(**pipeline.components, id2label={}).id2label == {}


def test_numbers_that_are_not_finite_draw_no_codes():
    pipeline = make_prior_pipeline()
    with torch.no_grad():
        next(pipeline.prior.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the prior predicts numbers that are not finite .in torch.float32"):
        draw(pipeline, 0)


def test_prior_refuses_the_codes_of_another_model():
    vae = make_plain_vq_model()
    prior = make_prior(vae)
    with pytest.raises(ValueError, match="another VQ model") as error:
        DAEVQGANPipeline(prior, make_plain_vq_model(seed=1))
    assert "\n" not in str(error.value)
    pipeline = DAEVQGANPipeline(prior, vae)
    with pytest.raises(ValueError, match="another VQ model"):
        pipeline.vae = make_plain_vq_model(seed=1)
    with pytest.raises(ValueError, match="another VQ model"):
        DAEVQGANPipeline(prior.half(), make_plain_vq_model(num_vq_embeddings=8).half())


def test_new_decoder_leaves_the_codes_what_they_are():
    vae = make_plain_vq_model()
    prior = make_prior(vae)
    torch.nn.init.zeros_(vae.decoder.conv_in.weight)
    DAEVQGANPipeline(prior, vae)
    assert code_fingerprint(vae) == autoencoder_fingerprint(vae, ("encoder", "quant_conv", "quantize"))


def test_decoupled_autoencoder_is_not_saved_as_it_is(tmp_path):
    vae = make_vq_model("vq").eval()
    pipeline = DAEVQGANPipeline(make_prior(vae), vae)
    with pytest.raises(ValueError, match="to_diffusers"):
        pipeline.save_pretrained(tmp_path)


def test_saved_pipeline_returns_in_every_precision(tmp_path):
    pipeline = make_prior_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = DAEVQGANPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label == PRIOR_NAMES
    assert torch.equal(draw(loaded, [0, 1]), draw(pipeline, [0, 1]))
    half = DAEVQGANPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.prior.dtype == half.vae.dtype == torch.bfloat16
    assert half("cat", output_type="np").images.shape == (1, 8, 8, 3)
    assert type(VQModel.from_pretrained(tmp_path, subfolder="vae")) is VQModel


def test_decoder_beyond_the_range_of_float16_draws_no_black_images():
    pipeline = make_prior_pipeline()
    pipeline.vae.decoder.conv_in.register_forward_hook(lambda _, inputs, found: found * 1e7)
    codes = torch.arange(16).view(1, 4, 4) % pipeline.vae.config.num_vq_embeddings
    expected = pipeline.decode_codes(codes)
    pipeline.vae.half()
    with pytest.warns(UserWarning, match="exceed the range of float16"):
        torch.testing.assert_close(pipeline.decode_codes(codes).float(), expected, atol=1e-2, rtol=1e-2)
    assert pipeline.vae.dtype == torch.float16


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match="`runs/x/pipeline` is neither a folder nor a Hub repository"):
        DAEVQGANPipeline.from_pretrained("runs/x/pipeline")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pipeline_saved_with_half_the_bits_returns_with_all(tmp_path, dtype):
    make_prior_pipeline().save_pretrained(tmp_path / "whole")
    DAEVQGANPipeline.from_pretrained(tmp_path / "whole", dtype=dtype).save_pretrained(tmp_path / "half")
    pipeline = DAEVQGANPipeline.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert pipeline.vae.dtype == torch.float32


def test_numbers_come_in_the_range_of_the_training_images(tmp_path):
    pipeline = make_prior_pipeline()
    pipeline = DAEVQGANPipeline(pipeline.prior, pipeline.vae, PRIOR_NAMES, value_range=[-1000.0, 3000.0])
    pipeline.save_pretrained(tmp_path)
    loaded = DAEVQGANPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images, unit = (loaded("cat", generator=generators(0), output_type=kind).images for kind in ("np", "pt"))
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), unit * 4000 - 1000)


ELSEWHERE = """
import sys
for name in ("dae_diffusers", "dae_diffusers.pipelines"):
    sys.modules[name] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline
folder = sys.argv[1]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
codes = pipe(["cat", 1], generator=torch.Generator().manual_seed(0), output_type="codes").images
torch.save(codes, sys.argv[2])
pipe.save_pretrained(sys.argv[3])
"""


def test_saved_pipeline_runs_with_diffusers_and_transformers_alone(tmp_path):
    pipeline = make_prior_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "run.py").write_text(ELSEWHERE)
    result = subprocess.run(
        [sys.executable, "run.py", "pipeline", "codes.pt", "again"],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "codes.pt"), draw(pipeline, ["cat", 1]))
    again = DAEVQGANPipeline.from_pretrained(tmp_path / "again")
    assert isinstance(again, DiffusionPipeline) and (tmp_path / "again" / "pipeline.py").exists()


def test_share_too_small_for_float32_leaves_the_likeliest_code():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert _draw_codes(logits, torch.tensor([0.999]), None, 1e-300).tolist() == [1]
