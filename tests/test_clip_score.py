"""The CLIP score is that of its formula, whatever the batches and processes, and stands beside real images and chance."""

import json
import shutil
from functools import wraps
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from models import make_autoencoder, make_random_transformer, save_clip, save_text_encoder
from scripts import in_both_processes, run, start
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import UserError
from dae_diffusers.generators.text import load_text_encoder
from dae_diffusers.metrics.checks import check_takes_text
from dae_diffusers.metrics.clip_score import clip_scores, load_clip, text_features
from dae_diffusers.metrics.sampling import Sampler, load_pipeline
from dae_diffusers.metrics.settings import SamplingConfig
from dae_diffusers.metrics.sweep import swept_settings, texts_of, what_to_draw
from dae_diffusers.training import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular", "ignore:.* images for ")

LONG = "a big red apple a small"  # with two marks as much as the tokenizer takes
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {kind: save_clip(folder / kind, kind) for kind in ("clip", "siglip")}


@torch.no_grad()
def cosines(folder: str, levels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Of each image `(B, 3, 8, 8)`, 0 to 255, with each text, one at a time, from the logits of the model itself."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = torch.zeros(len(levels), len(texts))
    padding = {"padding": "max_length", "max_length": 8} if model.config.model_type == "siglip" else {}
    for column, text in enumerate(texts):
        ids = tokenizer([text], return_tensors="pt", **padding).input_ids
        for row, pixel_values in enumerate((levels / 255 - MEAN) / STD):
            logits = model(input_ids=ids, pixel_values=pixel_values[None]).logits_per_image
            found[row, column] = (logits - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()
    return found


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_score_is_that_of_the_formula(clips, kind):
    clip, accelerator = load_clip(clips[kind]), Accelerator()
    levels = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    texts = ["a dog", "blue", "a big red apple", "a small cat", "green", "picture"]
    expected = 100 * cosines(clips[kind], levels, texts).clamp(min=0)
    images, of_texts = clip(levels / 127.5 - 1), text_features(texts, clip, accelerator)
    score, chance = clip_scores(images, of_texts)
    assert score == pytest.approx(expected.diag().mean().item(), rel=1e-5)
    assert chance == pytest.approx(expected.mean().item(), rel=1e-5)
    assert abs(score - chance) > 0.1 and (expected == 0).any()
    # Neither the batch nor texts beside it change a feature, gray is RGB with equal channels, and one text is one feature.
    repeated = [*reversed(texts), *texts]
    assert torch.equal(text_features(repeated, clip, accelerator, batch_size=5)[6:], of_texts)
    assert_close(clip(levels[4:5] / 127.5 - 1), images[4:5])
    gray = levels[:, :1] / 127.5 - 1
    assert torch.equal(clip(gray), clip(gray.repeat(1, 3, 1, 1)))


def test_longer_texts_are_cut_with_one_warning(clips, caplog):
    clip = load_clip(clips["clip"])
    features = text_features([f"{LONG} dog", f"{LONG} cat", LONG, LONG], clip, Accelerator())
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [
        "2 of 3 texts are longer than the 8 tokens that clip takes (up to 9): the rest is cut off."
    ]
    assert all(torch.equal(each, features[0]) for each in features)  # the mark at the end stays


def test_features_of_texts_are_kept_under_texts_and_model(clips, tmp_path, monkeypatch):
    texts, accelerator = ["a dog", "blue"], Accelerator()
    clip = load_clip(clips["clip"])
    features = text_features(texts, clip, accelerator, folder=tmp_path)
    computed = []
    encode = type(clip).text_features
    monkeypatch.setattr(type(clip), "text_features", lambda self, **of: computed.append(of) or encode(self, **of))
    assert torch.equal(text_features(texts[::-1], clip, accelerator, folder=tmp_path), features.flip(0))
    assert not computed
    text_features([*texts, "a cat"], clip, accelerator, folder=tmp_path)
    text_features(texts, load_clip(clips["siglip"]), accelerator, folder=tmp_path)
    assert len(computed) == 3  # loading a model tries it


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (Path.mkdir, "cannot be loaded: .*Allowed are a CLIP or SigLIP"),
        (save_text_encoder, "is a BertModel, which does not compare images with texts. Give a CLIP or SigLIP"),
        (lambda folder: save_text_encoder(folder, "clip"), "cannot be loaded: .*preprocessor_config.json"),
        (lambda folder: [save_clip(folder), *map(Path.unlink, folder.glob("tokenizer*"))], "has no tokenizer in its"),
    ],
)  # fmt: skip
def test_what_is_no_clip_is_answered_with_a_sentence(tmp_path, save, message):
    save(tmp_path / "x")
    with pytest.raises(UserError, match=message) as error:
        load_clip(str(tmp_path / "x"))
    assert "\n" not in str(error.value) and "`clip_model`" in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image_folder, clips):
    """Twenty-four pictures with a caption each, two without one, a pipeline that draws from text, and a judge."""
    folder = tmp_path_factory.mktemp("captioned")
    shutil.copytree(image_folder, folder / "images")
    names = sorted(path.relative_to(image_folder) for path in image_folder.rglob("*.png"))
    colours = ("red", "green", "blue", "small", "big")
    rows = [
        {"file_name": str(name), "text": "" if number in (3, 20) else f"a {colours[number % 5]} {name.parent}"}
        for number, name in enumerate(names)
    ]
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, encoder = load_text_encoder(save_text_encoder(folder / "encoder"))
    transformer = make_random_transformer(attention_head_dim=8, cross_attention_dim=16)
    vae = make_autoencoder(sample_size=16).to_diffusers()
    parts = {"tokenizer": tokenizer, "text_encoder": encoder}
    DAEDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler(), **parts).save_pretrained(folder / "pipeline")
    return folder


def found_in(result: dict) -> dict[str, float]:
    """All numbers of the CLIP score, by where they stand."""
    rows, floor = result["generation"], result["floor"]["generation"]
    of = {f"{n}": row for n, row in enumerate([*rows, *floor["samples"], floor["real"]])}
    return {
        f"{place} {name}": value for place, row in of.items() for name, value in row.items() if name.startswith("clip_")
    }


def test_samples_real_images_and_chance_are_measured_alike_by_one_process_and_two(folder, clips, tmp_path, monkeypatch):
    flags = (
        f"--pipeline {folder / 'pipeline'} --train_data_dir {folder / 'images'} --validation_fraction 0.4 --lpips_net none --features "
        f"pixels --clip_model {clips['clip']} --num_inference_steps 1 --guidance_scales 1 2 --num_drawings 2 --num_images 14 "
        "--caption_column text"
    )
    code, text = in_both_processes(lambda: start(f"{flags} --batch_size 5", evaluate, output_dir=tmp_path / "2"))
    assert code == 0, text
    drawn, call = [], DAEDiTPipeline.__call__

    def watched(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        drawn.append((torch.tensor(output.images[:14]).permute(0, 3, 1, 2), kwargs["prompt"][:14]))
        return output

    monkeypatch.setattr(DAEDiTPipeline, "__call__", wraps(call)(watched))
    run(evaluate, flags, output_dir=tmp_path / "1")
    first, second = (json.loads((tmp_path / number / "metrics.json").read_text()) for number in "12")
    assert found_in(second) == pytest.approx(found_in(first), rel=1e-6) and len(found_in(first)) == 12
    rows, floor = first["generation"], first["floor"]["generation"]

    clip, accelerator = load_clip(clips["clip"]), Accelerator()

    def measure(images: torch.Tensor, texts: list[str]) -> list[float]:
        places = [place for place, text in enumerate(texts) if text]
        return [*clip_scores(clip(images[places]), text_features([texts[n] for n in places], clip, accelerator))]

    assert [texts.count("") for _, texts in drawn] == [1] * 4
    of_drawings = torch.tensor([measure(images * 2 - 1, texts) for images, texts in drawn]).view(2, 2, 2)
    for row, few, expected in zip(rows, floor["samples"], of_drawings, strict=True):
        found = [row[name] for name in ("clip_score_clip", "clip_chance_clip", "clip_score_clip_sd")]
        assert found == pytest.approx([*expected.mean(0).tolist(), expected[:, 0].std().item()], rel=1e-3)
        images, texts = (each[: floor["num_images"]] for each in drawn[2 * rows.index(row)])
        assert few["clip_score_clip"] == pytest.approx(measure(images * 2 - 1, texts)[0], rel=1e-3)
    config = DataConfig(
        train_data_dir=str(folder / "images"), resolution=16, caption_column="text", validation_fraction=0.4
    )
    held_out = load_images(config)[1]
    images = torch.stack([held_out[n]["pixel_values"] for n in range(len(held_out))])
    found = [floor["real"][name] for name in ("clip_score_clip", "clip_chance_clip")]
    assert found == pytest.approx(measure(images, [texts[0] for texts in held_out.captions]), rel=1e-5)
    report = (tmp_path / "1" / "metrics.md").read_text()
    assert "clip_score_clip ↑ | clip_chance_clip |" in report and "CLIP score: 100 times the cosine between" in report


def test_texts_of_classes_are_those_of_the_prompt(folder):
    config = DataConfig(train_data_dir=str(folder / "images"), resolution=16)
    images = load_images(config)[0]
    sampling = SamplingConfig(prompt="a small {label}", num_images=5)
    pipeline = load_pipeline(str(folder / "pipeline"), torch.device("cpu"))
    assert texts_of(sampling, images) == [f"a small {images.id2label[label]}" for label in images.labels]
    (settings,) = swept_settings(
        sampling, 0, sampler := Sampler(pipeline, **what_to_draw(sampling, images, pipeline)), images
    )
    labels = settings.labels(sampler.num_classes).tolist()
    assert (
        sampler.texts(settings) == [f"a small {images.id2label[label]}" for label in labels] and len(set(labels)) == 2
    )
    sampling = SamplingConfig(prompt="a dog", num_images=2)
    (settings,) = swept_settings(sampling, 0, sampler := Sampler(pipeline, ("a dog",)), images)
    assert sampler.texts(settings) == ["a dog"] * 2 and texts_of(sampling, images) == ["a dog"] * len(images)


def test_a_pipeline_without_text_is_refused(folder):
    parts = load_pipeline(str(folder / "pipeline"), torch.device("cpu")).components
    with_text = DAEDiTPipeline(**parts)
    check_takes_text("mine", with_text)
    transformer = make_random_transformer(attention_head_dim=8)
    without = DAEDiTPipeline(transformer, parts["vae"], parts["scheduler"])
    with pytest.raises(UserError, match="mine is a DAEDiTPipeline that takes no text: leave it out"):
        check_takes_text("mine", without)
