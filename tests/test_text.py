"""Captions: they are encoded once, padding means nothing, several of an image are drawn in an order that resuming keeps."""

import codecs
import json
import math
import re
import shutil
import tarfile
import zipfile
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from device import DEVICE, OnDevice, WithoutFloat64
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from models import make_autoencoder, make_random_transformer, save_autoencoder, save_backbone, save_text_encoder
from PIL import Image
from safetensors.torch import load_file
from scripts import (
    TINY_DIT,
    TRANSFORMER,
    assert_goes_on_exactly,
    assert_same_weights,
    assert_two_processes_equal_one,
    in_child,
    log_of,
    run,
)
from torch.testing import assert_close

from dae_diffusers import DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.folders import load_folder
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.generators.conditioning import Conditioning
from dae_diffusers.generators.take_over import take_over
from dae_diffusers.generators.text import Captions, encode_once, load_text_encoder
from dae_diffusers.generators.warm_start import WarmStart
from dae_diffusers.hub.card import make_card, repository_files
from dae_diffusers.hub.results import read_result
from dae_diffusers.metrics.sampling import Sampler, load_pipeline, prompts_of_images
from dae_diffusers.pipelines.dae_dit import encode_texts
from dae_diffusers.settings import compose
from dae_diffusers.training import cache_latents, evaluate, train_dit
from dae_diffusers.training.settings import TrainDiTConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

TEXTS = ["a big red apple", "a dog", "blue"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of text encoders by kind, made on first use."""
    folder = tmp_path_factory.mktemp("encoders")

    def of_kind(kind: str = "bert") -> str:
        place = folder / kind
        return (
            str(place)
            if place.exists()
            else save_text_encoder(place, kind.removesuffix("-bare"), marks="bare" not in kind)
        )

    return of_kind


@pytest.fixture(scope="module")
def data(tmp_path_factory, image_folder):
    """Twelve pictures with one to three captions each, without classes, and an autoencoder."""
    folder = tmp_path_factory.mktemp("captioned")
    (folder / "images").mkdir()
    rows = []
    for number, path in enumerate(sorted(image_folder.rglob("*.png"))[:12]):
        shutil.copy(path, folder / "images" / path.name)
        rows.append(
            {
                "file_name": path.name,
                "text": [f"a {size} {path.parent.name}" for size in ("big", "small", "red")][: 1 + number % 3],
            }
        )
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_autoencoder(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def flags(data, encoders):
    return (
        f"{TINY_DIT} --resolution 16 --vae {data / 'vae'} --train_data_dir {data / 'images'} --label_column none --validation_fraction 0.2 --caption_column text "
        f"--text_encoder {encoders()} --class_dropout_prob 0.3 --metric_features {save_backbone(data / 'judge', 'classifier')} "
        "--metric_images 10 --metric_steps 99"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run") / "run"
    run(train_dit, flags, output_dir=folder)
    return folder


def random_transformer(**config) -> DAEDiTTransformer2DModel:
    return make_random_transformer(**{"attention_head_dim": 8, "cross_attention_dim": 16, **config})


def make_pipeline(encoder: str | None, **config) -> DAEDiTPipeline:
    parts = {} if encoder is None else dict(zip(("tokenizer", "text_encoder"), load_text_encoder(encoder), strict=True))
    vae = make_autoencoder(sample_size=16).to_diffusers()
    pipeline = DAEDiTPipeline(random_transformer(**config), vae, FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, *args, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        *args, **{"num_inference_steps": 2, "output_type": "latent", "generator": generator} | kwargs
    ).images


@pytest.mark.parametrize("kind", ["bert", "bert-bare", "clip", "t5"])
def test_kept_states_equal_computed_ones_whatever_the_encoder(encoders, tmp_path, kind):
    tokenizer, model = load_text_encoder(encoders(kind))
    states, _ = encode_once(tokenizer, model, [*TEXTS, *TEXTS], Accelerator(), tmp_path)
    kept, mask = states[[*TEXTS, ""]]
    assert kept.shape[1] == 8 and mask.any(1).all()
    for number, text in enumerate([*TEXTS, ""]):
        alone, _ = encode_texts(tokenizer, model, [text])
        assert_close(kept[number][mask[number]], alone[0], atol=1e-5, rtol=1e-4)
        assert not kept[number][~mask[number]].any()


def test_shards_that_are_there_are_not_computed_again(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr("dae_diffusers.generators.text.CHUNK_SIZE", 2)
    tokenizer, model = load_text_encoder(encoders())
    accelerator = Accelerator()
    states, of = encode_once(tokenizer, model, TEXTS, accelerator, tmp_path)
    expected, files = states[TEXTS], sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    first = files[0].stat().st_mtime_ns
    files[1].write_bytes(files[1].read_bytes()[:-1])
    states, again = encode_once(*load_text_encoder(encoders()), TEXTS[::-1], accelerator, tmp_path)
    assert again == of and files[0].stat().st_mtime_ns == first
    assert all(map(torch.equal, states[TEXTS], expected))
    assert encode_once(tokenizer, model, TEXTS[:2], accelerator, tmp_path)[1] != of
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += 1
    assert encode_once(tokenizer, model, TEXTS, accelerator, tmp_path)[1] != of


def test_longer_captions_are_cut_with_one_warning(encoders, tmp_path, caplog):
    tokenizer, model = load_text_encoder(encoders())
    long = "a big red apple a small"  # and two marks
    states, _ = encode_once(tokenizer, model, [*TEXTS, f"{long} dog", f"{long} cat"], Accelerator(), tmp_path)
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [
        "2 of 6 captions are longer than the 8 tokens that the text encoder takes (up to 9): the rest is cut off."
    ]
    assert all(map(torch.equal, states[[f"{long} dog"]], states[[f"{long} cat"]]))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: save_text_encoder(folder, "dpr"), "DPRQuestionEncoder, which gives no hidden states"),
        (lambda folder: save_backbone(folder, "vit"), "cannot be loaded"),
        (
            lambda folder: [save_text_encoder(folder), *map(Path.unlink, folder.glob("tokenizer*"))],
            "without a tokenizer",
        ),
        (lambda folder: folder.mkdir(), "cannot be loaded: .* such as openai/clip"),
    ],
)
def test_what_is_no_text_encoder_is_answered_with_a_sentence(tmp_path, break_it, message):
    break_it(tmp_path / "x")
    with pytest.raises(UserError, match=message) as error:
        load_text_encoder(str(tmp_path / "x"))
    assert "\n" not in str(error.value) and "`text_encoder`" in str(error.value)


def test_padding_of_a_text_changes_nothing_and_the_text_something():
    transformer = random_transformer()
    latents, timestep = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0])
    states, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def predict(states, mask=None, rows=slice(None)):
        given = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        return transformer(latents[rows], timestep[rows], **given).sample

    expected = predict(states, mask)
    wider = torch.cat((states, torch.full((2, 7, 16), 1e3)), dim=1)
    assert_close(predict(wider, torch.nn.functional.pad(mask, (0, 7))), expected)
    assert_close(predict(states[1:, :2], rows=slice(1, 2)), expected[1:])
    assert (predict(states, torch.ones(2, 5))[1] - expected[1]).abs().max() > 1e-3


def test_model_without_text_is_as_it_was():
    """Weights are made in the order of their names, so equal names and config mean equal weights for a seed."""
    transformer = random_transformer(cross_attention_dim=None, num_layers=1, num_classes=2)
    assert list(transformer.state_dict()) == [
        *("patch_embed.weight", "patch_embed.bias", "time_embed.linear_1.weight", "time_embed.linear_1.bias"),
        *("time_embed.linear_2.weight", "time_embed.linear_2.bias", "label_embed.weight"),
        *("modulation.weight", "modulation.bias", "transformer_blocks.0.attn.qkv_proj.weight"),
        *("transformer_blocks.0.attn.out_proj.weight", "transformer_blocks.0.ff.gate_up_proj.weight"),
        *("transformer_blocks.0.ff.down_proj.weight", "proj_out.weight", "proj_out.bias"),
    ]
    assert transformer.config.cross_attention_dim is None
    with pytest.raises(ValueError, match="takes no text"):
        transformer(torch.zeros(1, 3, 8, 8), torch.zeros(1), encoder_hidden_states=torch.zeros(1, 2, 16))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"`encoder_hidden_states` are missing, but must be \(2, T, 16\)"),
        ({"encoder_hidden_states": torch.zeros(2, 4, 8)}, r"shape \(2, 4, 8\)"),
        (
            {"encoder_hidden_states": torch.zeros(2, 4, 16), "encoder_attention_mask": torch.ones(2, 3)},
            r"`encoder_attention_mask` has shape \(2, 3\), but must be \(2, 4\)",
        ),
    ],
)
def test_text_that_does_not_fit_the_transformer_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        random_transformer()(torch.zeros(2, 3, 8, 8), torch.zeros(2), **given)


def test_text_begins_so_that_it_changes_nothing_and_may_be_left_out_again():
    old = random_transformer(cross_attention_dim=None)
    sizes = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "rows": None}
    new, changes = take_over(old, **sizes, cross_attention_dim=16)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]))
    text = {"encoder_hidden_states": torch.randn(2, 3, 16)}
    assert changes == ["text is new"] and torch.equal(new(*inputs, **text).sample, old(*inputs).sample)
    kept, changes = take_over(random_transformer(), **sizes, cross_attention_dim=16)
    assert changes == [] and torch.equal(kept(*inputs, **text).sample, random_transformer()(*inputs, **text).sample)
    without, changes = take_over(new, **sizes)
    assert changes == ["its text is left out"] and torch.equal(without(*inputs).sample, old(*inputs).sample)
    other, changes = take_over(random_transformer(), **sizes, cross_attention_dim=12)
    assert changes == ["its text is new"] and not other.transformer_blocks[0].cross_attn.out_proj.weight.any()


def test_start_with_another_text_encoder_says_so_and_distillation_refuses_it(
    trained, flags, encoders, tmp_path, caplog
):
    caplog.set_level("INFO")
    given = str(trained / "pipeline")
    for kind, said in (("bert", "for flow matching: all else"), ("clip", "the text encoder is another one; all else")):
        caplog.clear()
        WarmStart.load(given).continued(8, 3, 2, None, load_text_encoder(encoders(kind))[1])
        assert said in caplog.text
    half = load_text_encoder(encoders(), torch.bfloat16)[1]
    WarmStart.load(given).continued(8, 3, 2, None, half, flow_map=True)  # is none
    other = re.sub("--model .* --max_train", "--max_train", flags.replace(encoders(), encoders("clip")))
    with pytest.raises(UserError, match="draws, but the text encoder is another one. Give .* any text encoder that"):
        run(
            train_dit,
            f"{other} --distill_guidance_scale 1.5 --pretrained_model_name_or_path {given}",
            output_dir=tmp_path,
        )


def test_prompts_embeddings_and_labels_mean_the_same_in_every_form(encoders):
    pipeline = make_pipeline(encoders(), num_classes=2)
    expected = sample(pipeline, "a dog", class_labels=1, negative_prompt="blue", guidance_scale=3)
    encoded = pipeline.encode_prompt("a dog", "blue")
    names = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
    given = dict(zip(names, encoded, strict=True))
    assert torch.equal(sample(pipeline, class_labels=1, guidance_scale=3, **given), expected)
    for change in ({"negative_prompt": ""}, {"prompt": "a cat"}, {"class_labels": 0}, {"guidance_scale": 1}):
        asked = {"prompt": "a dog", "class_labels": 1, "negative_prompt": "blue", "guidance_scale": 3} | change
        assert not torch.equal(sample(pipeline, **asked), expected)
    assert torch.equal(sample(pipeline, "a dog", negative_prompt=""), sample(pipeline, "a dog"))
    away = sample(pipeline, negative_prompt="blue", guidance_scale=3)  # from the empty text
    assert torch.equal(away, sample(pipeline, "", negative_prompt="blue", guidance_scale=3))
    assert not torch.equal(away, sample(pipeline, guidance_scale=3))
    assert torch.equal(sample(pipeline), sample(pipeline, "", guidance_scale=1))
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    images = sample(pipeline, ["a big red apple", "blue"], num_images_per_prompt=2, generator=generators)
    alone = sample(pipeline, "blue", generator=torch.Generator().manual_seed(3))
    assert_close(images[3:], alone, atol=1e-4, rtol=1e-4)
    for wrong in ({"prompt_embeds": encoded[0]}, {}):
        with pytest.raises(ValueError, match=r"a mask of a prompt has the shape \(1, 99\)"):
            sample(pipeline, class_labels=1, prompt_embeds_mask=torch.ones(1, 99), **wrong)


def test_classes_and_texts_are_left_out_together_and_alone():
    """A call may then name one of them, as the Space does whose prompt is empty."""
    captions = SimpleNamespace(dropped=lambda batch, is_dropped: {"has_text": ~is_dropped})
    conditioning, latents = Conditioning(null_class=2, dropout=0.25, captions=captions), torch.zeros(4000, 1, 1, 1)
    batch = {"class_labels": torch.zeros(4000, dtype=torch.int64), "encoder_hidden_states": latents}
    given = conditioning.with_dropout(batch, latents)
    kept = torch.stack((given["class_labels"] != 2, given["has_text"])).int()
    shares = torch.bincount(2 * kept[0] + kept[1], minlength=4) / 4000  # nothing, the text, the class, both
    assert_close(shares, torch.tensor([0.297, 0.141, 0.141, 0.422]), atol=0.03, rtol=0)
    nothing = conditioning.nothing(batch, latents)
    assert (nothing["class_labels"] == 2).all() and not nothing["has_text"].any()


def test_texts_are_encoded_where_their_encoder_lies(encoders):
    """While a transformer trains on a GPU, its text encoder waits on the CPU."""
    pipeline = make_pipeline(encoders())
    expected = pipeline.encode_prompt("a dog", device="cpu")[0]
    with WithoutFloat64():
        found = pipeline.encode_prompt("a dog", device=DEVICE)[0]
    assert isinstance(found, OnDevice) and torch.equal(found.values, expected)


def test_prompts_are_encoded_without_the_other_models(encoders, tmp_path):
    pipeline = make_pipeline(encoders())
    pipeline.save_pretrained(tmp_path)
    part = DAEDiTPipeline.from_pretrained(tmp_path, transformer=None, vae=None)
    assert torch.equal(part.encode_prompt("a dog")[0], pipeline.encode_prompt("a dog")[0])
    with pytest.raises(ValueError, match="was loaded without its `transformer`, so it cannot draw"):
        part("a dog")


@pytest.mark.parametrize(
    ("config", "encoder", "given", "message"),
    [
        ({"cross_attention_dim": None}, None, {"prompt": "a dog"}, "this pipeline is unconditional: its transformer takes no text"),
        ({"cross_attention_dim": None, "num_classes": 2}, None, {"class_labels": 1, "negative_prompt": "x"}, "draws by class"),
        ({}, None, {"prompt": "a dog"}, "has no `text_encoder`. Load it with one, or pass `prompt_embeds`"),
        ({}, None, {}, "it needs `prompt_embeds`"),
        ({}, None, {"prompt_embeds": torch.zeros(1, 2, 16)}, "it needs `negative_prompt_embeds`"),
        ({}, "bert", {"class_labels": 1}, "this pipeline has no classes. Say it in words: `prompt`"),
        ({"num_classes": 2}, "bert", {"prompt": 1}, r"`prompt` is \[1\], but must be one or more texts"),
        ({}, "bert", {"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 16)}, "leave one of them out"),
        ({}, "bert", {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "give as many of each, or one for all"),
        ({}, "bert", {"prompt": []}, "must be one or more texts"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_draw_from_is_named(encoders, config, encoder, given, message):
    with pytest.raises(ValueError, match=message) as error:
        sample(make_pipeline(encoder and encoders(encoder), **config), **given)
    assert "\n" not in str(error.value)


def test_a_weaker_transformer_guides_with_the_same_text_and_no_negative_one(encoders):
    pipeline = make_pipeline(encoders())
    itself = DAEDiTPipeline(**pipeline.components | {"guidance_transformer": pipeline.transformer})
    itself.set_progress_bar_config(disable=True)
    assert_close(sample(itself, "a dog"), sample(pipeline, "a dog", guidance_scale=1), atol=1e-4, rtol=1e-4)
    embeds = pipeline.encode_prompt("a dog")[0]
    itself.tokenizer = itself.text_encoder = None  # embeddings of the text are enough
    assert_close(
        sample(itself, prompt_embeds=embeds), sample(pipeline, "a dog", guidance_scale=1), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="guidance leads away from what `guidance_transformer` draws. Leave it out"):
        sample(itself, prompt_embeds=embeds, negative_prompt="blue")


def test_text_encoder_of_another_width_is_refused(encoders):
    with pytest.raises(ValueError, match="gives 16 channels a token, and the transformer takes 12"):
        make_pipeline(encoders(), cross_attention_dim=12)


def test_result_draws_from_prompts_in_all_three_ways(trained):
    folder = str(trained / "pipeline")
    pipelines = [
        DAEDiTPipeline.from_pretrained(folder),
        DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True),
        load_pipeline(folder, torch.device("cpu")),
    ]
    images = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        images.append(sample(pipeline, "a red dog", negative_prompt="blue"))
    assert all(torch.equal(images[0], each) for each in images[1:])
    with pytest.warns(
        UserWarning, match="a prompt has [0-9]+ tokens, and the text encoder takes [0-9]+: the rest is cut off"
    ):
        sample(pipelines[0], "a red dog " * 200, num_inference_steps=1)
    assert (trained / "train_dit" / "grids" / "samples-00000006.png").exists()
    again = DAEDiTPipeline(**pipelines[0].components)
    again.save_pretrained(trained / "again")
    assert torch.equal(
        sample(DAEDiTPipeline.from_pretrained(trained / "again"), "a red dog", negative_prompt="blue"), images[0]
    )


def test_card_names_the_text_encoder_and_shows_a_prompt(trained):
    card = make_card(read_result(trained), "user/text", data_pictures=True)
    prompt = json.loads((trained / "train_dit" / "run.json").read_text())["prompt"]
    assert card.data.pipeline_tag == "text-to-image"
    assert (
        f'a text encoder (`BertModel`), whose weights are in `text_encoder/` and were not trained here. A prompt: "{prompt}".'
        in card.text
    )
    assert f'image = pipe("{prompt}", guidance_scale=2.0, num_inference_steps=2).images[0]' in card.text
    files = repository_files(read_result(trained), "user/text")  # these images are private
    text = files["README.md"].decode()
    assert "A prompt:" not in text and 'image = pipe("...", guidance_scale=2.0' in text
    assert prompt.encode() not in files["README.md"] + files["training/train_dit.json"]
    assert "images/samples.png" not in files
    assert "--text_encoder path/to/text_encoder" in card.text and str(trained.parent) not in card.text


@pytest.mark.filterwarnings("ignore:2 images for")
def test_samples_are_measured_with_captions_of_the_data(trained, data, tmp_path, monkeypatch):
    assert "validation/gfd_judge" in log_of(trained, "train_dit")[-1] | log_of(trained, "train_dit")[-2]
    measured = (
        f"--pipeline {trained / 'pipeline'} --features {data / 'judge'} --guidance_scales 2 --num_inference_steps 1"
    )
    images = f"--train_data_dir {data / 'images'} --label_column none --validation_fraction 0.2 --lpips_net none"
    with pytest.raises(UserError, match="give `prompt`, such as .* or the `caption_column` of the images"):
        run(evaluate, f"{measured} {images}", output_dir=tmp_path)
    run(evaluate, f"{measured} {images} --caption_column text", output_dir=tmp_path)
    (row,) = json.loads((tmp_path / "metrics.json").read_text())["generation"]
    assert row["gfd_judge"] > 0 and row["num_images"] == 10 and "prompts" not in row
    # Of validation images instead: each of its captions, several times.
    drawn = []
    call = DAEDiTPipeline.__call__
    counted = wraps(call)(lambda self, *given, **more: drawn.extend(more["prompt"]) or call(self, *given, **more))
    monkeypatch.setattr(DAEDiTPipeline, "__call__", counted)
    run(evaluate, f"{measured} {images} --caption_column text --draw_from validation", output_dir=tmp_path / "new")
    config = DataConfig(
        train_data_dir=str(data / "images"),
        resolution=16,
        caption_column="text",
        label_column="none",
        validation_fraction=0.2,
    )
    assert set(drawn[-10:]) == {captions[0] for captions in load_images(config)[1].captions}


def test_captions_are_drawn_by_the_draw_alone(data, encoders, tmp_path):
    config = DataConfig(train_data_dir=str(data / "images"), resolution=16, caption_column="text", label_column="none")
    images = load_images(config)
    captions = Captions(encoders(), torch.float32, images, Accelerator(), tmp_path)
    rows, _ = captions.add_to(*images)
    several = next(n for n, each in enumerate(images[0].captions) if len(each) == 3)
    drawn = {rows._text(several, draw) for draw in range(50)}
    assert drawn == set(images[0].captions[several])
    batch = rows.__getitems__([(several, 5), (0, 6), several])
    texts = [rows._text(several, 5), rows._text(0, 6), images[0].captions[several][0]]
    assert torch.equal(batch["encoder_hidden_states"], captions.states[texts][0])
    dropped = captions.dropped(batch, torch.tensor([True, False, True]))
    for name, expected in zip(dropped, captions.states[["", texts[1], ""]], strict=True):
        assert torch.equal(dropped[name], expected)
    # A caption for each prompt, and its class where the pipeline has classes.
    sampler = Sampler(make_pipeline(encoders()), **prompts_of_images(images[1], 4))
    assert sampler.arguments([0], 1) == {"prompt": [images[1].captions[0][0]]}
    with pytest.raises(UserError, match="give `prompt`, such as .* or the `caption_column`"):
        Sampler(make_pipeline(encoders()))


def test_resumed_run_draws_the_captions_of_an_uninterrupted_one(trained, flags):
    assert_goes_on_exactly(in_child, train_dit, flags, trained, 3, TRANSFORMER)


def test_two_processes_equal_one_that_accumulates(trained, flags, tmp_path):
    assert_two_processes_equal_one(train_dit, flags, tmp_path, TRANSFORMER)


def test_captions_beside_cached_latents_train_the_same_transformer(trained, data, flags, tmp_path, monkeypatch):
    """Also if the grid shows other texts."""
    shown = []
    draw = train_dit.draw_sample_grid
    monkeypatch.setattr(
        train_dit, "draw_sample_grid", lambda *given, **more: shown.append(more["prompts"]) or draw(*given, **more)
    )
    images = f"--train_data_dir {data / 'images'} --label_column none --validation_fraction 0.2 --dtype float32 --resolution 16 --vae {data / 'vae'}"
    run(cache_latents, images, output_dir=tmp_path / "cache")
    run(
        train_dit, f"{flags} --validation_prompts cat dog", output_dir=tmp_path / "run", latent_cache=tmp_path / "cache"
    )
    assert shown and all(prompts == ["cat", "dog"] for prompts in shown)
    assert_same_weights(
        load_file(trained / TRANSFORMER), load_file(tmp_path / "run" / TRANSFORMER), rtol=1e-3, atol=1e-4
    )
    assert list((tmp_path / "cache" / "captions").rglob("*.safetensors"))


def test_run_does_not_go_on_with_other_captions(trained, data, flags, tmp_path):
    shutil.copytree(data / "images", tmp_path / "images")
    table = tmp_path / "images" / "metadata.jsonl"
    table.write_text(table.read_text().replace("big", "blue"))
    flags = flags.replace(str(data / "images"), str(tmp_path / "images"))
    with pytest.raises(UserError, match="the captions or their encoder changed since"):
        run(train_dit, flags, output_dir=trained, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"caption_column": "text"}, "`caption_column` needs `text_encoder`"),
        ({"text_encoder": "x"}, "`text_encoder` needs `caption_column`"),
        ({"caption_column": ["text", "text"], "text_encoder": "x"}, "`caption_column` holds 'text' twice"),
        ({"caption_column": "text", "text_encoder": "x", "streaming": True}, "does not go with `streaming`"),
        (
            {"caption_column": "text", "text_encoder": "x", "dataset_name": None, "latent_cache": "x"},
            "needs the images' data set",
        ),
    ],
)
def test_captions_that_cannot_be_used_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        compose(TrainDiTConfig, **{"vae": "x", "dataset_name": "user/data", **given})


def save_pictures(folder: Path) -> Path:
    for number in range(4):
        path = folder / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(path)
    return folder / "images"


def write_table(folder: Path, suffix: str, rows: list[dict]) -> None:
    table = datasets.Dataset.from_list(rows)
    getattr(table, "to_csv" if suffix == "csv" else "to_json")(folder / f"metadata.{suffix}")


def pack(folder: Path, beside: dict[str, str]) -> None:
    """Puts the pictures into a webdataset, each with the files beside it."""
    with tarfile.open(folder / "data.tar", "w") as archive:
        for path in sorted(folder.glob("*.png")):
            for suffix, text in beside.items():
                path.with_suffix(suffix).write_text(text.format(path.stem))
                archive.add(path.with_suffix(suffix), f"{path.stem}{suffix}")
                path.with_suffix(suffix).unlink()
            archive.add(path, path.name)
            path.unlink()


def load(folder: Path, column: str | list[str]) -> dict[str, list[str]]:
    """The captions of each picture, by its number, which its colour tells."""
    train, validation = load_images(
        DataConfig(train_data_dir=str(folder), resolution=8, caption_column=column, validation_fraction=0.25)
    )
    items = [(images[n], images.captions[n]) for images in (train, validation) for n in range(len(images))]
    return {str(round((item["pixel_values"][0].mean().item() + 1) * 127.5 / 60)): texts for item, texts in items}


def test_captions_come_from_tables_texts_and_webdatasets(tmp_path_factory, caplog):
    def make(write) -> Path:
        folder = save_pictures(tmp_path_factory.mktemp("data"))
        write(folder)
        return folder

    rows = [{"file_name": f"{n}.png", "text": f"number {n}", "more": [f"{n}", "", f" so\n{n}"]} for n in range(4)]
    plain = [{name: row[name] for name in ("file_name", "text")} for row in rows]
    one = {str(n): [f"number {n}"] for n in range(4)}
    assert load(make(lambda folder: write_table(folder, "jsonl", rows)), "text") == one
    assert load(make(lambda folder: write_table(folder, "csv", plain)), "text") == one
    several = {str(n): [f"{n}", f"so {n}"] for n in range(4)}
    assert load(make(lambda folder: write_table(folder, "jsonl", rows)), "more") == several
    mixed = [
        {**row, "more": row["more"] if n % 2 else f"only {n}", "text": n or "none yet"} for n, row in enumerate(rows)
    ]
    lines = "\n".join(map(json.dumps, mixed))
    some_lists = make(lambda folder: (folder / "metadata.jsonl").write_text(lines))
    assert load(some_lists, "more") == {str(n): [f"{n}", f"so {n}"] if n % 2 else [f"only {n}"] for n in range(4)}
    assert load(some_lists, "text") == {"0": ["none yet"]} | {str(n): [str(n)] for n in range(1, 4)}
    odd = ["[]", '["a", null]', "['b', None, 'c']", "[not a list"]
    quoted = "".join(f'{n}.png,"{text.replace(chr(34), chr(34) * 2)}"\n' for n, text in enumerate(odd))
    written = make(lambda folder: (folder / "metadata.csv").write_text("file_name,text\n" + quoted))
    assert load(written, "text") == {"0": [""], "1": ["a"], "2": ["b", "c"], "3": ["[not a list"]}
    unknown = [{"file_name": f"{n}.png", "text": [f"{n}"] if n % 2 else math.nan} for n in range(4)]
    lines_of_unknown = "\n".join(map(json.dumps, unknown))
    written = make(lambda folder: (folder / "metadata.jsonl").write_text(lines_of_unknown))
    assert load(written, "text") == {"0": [""], "1": ["1"], "2": [""], "3": ["3"]}
    both_columns = {str(n): [f"number {n}", f"{n}", f"so {n}"] for n in range(4)}
    assert load(make(lambda folder: write_table(folder, "jsonl", rows)), ["text", "more"]) == both_columns
    rows_of_mappings = [
        {"file_name": f"{n}.png", "sentences": [{"raw": f"{n}", "id": 1}, {"raw": f"so {n}", "id": 2}], "none": "NaN"}
        for n in range(4)
    ]
    mappings = make(lambda folder: write_table(folder, "jsonl", rows_of_mappings))
    assert load(mappings, "sentences.raw") == several
    with pytest.raises(UserError, match="'sentences.id' holds Value.*, not texts"):
        load(mappings, "sentences.id")
    with pytest.raises(UserError, match="'sentences.words' is not among the columns"):
        load(mappings, "sentences.words")
    caplog.clear()
    load(mappings, "none")
    assert "3 captions of the split 'train' are 'NaN', as programs write a missing text." in caplog.text

    def texts(folder: Path) -> None:
        for n in range(3):  # the fourth has none
            (folder / f"{n}.txt").write_text(f"number {n}\n")

    def both(folder: Path) -> None:
        write_table(folder, "jsonl", rows)
        (folder / "0.txt").write_bytes(b"\xff\xff\x00 no text, which nobody asked for")

    assert load(make(both), "text") == one
    beside = make(texts)
    assert load(beside, "txt") == one | {"3": [""]}
    assert "have no caption: their text is empty" in caplog.text
    with pytest.raises(UserError, match="'text' is not among the columns .*; columns with text are \\[\\]. A .txt"):
        load(beside, "text")
    assert load_images(DataConfig(train_data_dir=str(beside), resolution=8))[0].captions is None
    sides = {".txt": "number {}", ".json": '{{"all": ["{0}", "so {0}"], "size": 3}}'}
    archive = make(lambda folder: pack(folder, sides))
    assert load(archive, "txt") == one and load(archive, "json.all") == several
    with pytest.raises(UserError, match="`caption_column` 'json.size' holds Value.*, not texts"):
        load(archive, "json.size")
    # A list in a CSV file is shown as JSON, or as Python or NumPy show it.
    lists = ['["0", "so 0"]', "[ '1', \"so 1\"]", "['2' 'so\\n2']", "['3', 'so 3' ]"]
    shown = [{"file_name": f"{n}.png", "text": each} for n, each in enumerate(lists)]
    assert load(make(lambda folder: write_table(folder, "csv", shown)), "text") == several
    shown[0]["text"], shown[1]["text"], shown[2]["text"] = "['a', 1]", "[a] 'b'", "['it's']"
    kept = load(make(lambda folder: write_table(folder, "csv", shown)), "text")
    assert [kept[str(n)] for n in range(3)] == [[each["text"]] for each in shown[:3]]
    # That the few images that are held out have no text is no mistake.
    caplog.clear()
    for n in range(4):
        lone = [{"file_name": f"{each}.png", "text": "" if each == n else "a"} for each in range(4)]
        assert load(make(lambda folder, lone=lone: write_table(folder, "jsonl", lone)), "text")[str(n)] == [""]
    assert "1 of 1 images of the held-out part of the split 'train' have no caption" in caplog.text
    empty = make(
        lambda folder: write_table(folder, "jsonl", [{"file_name": f"{n}.png", "text": " "} for n in range(4)])
    )
    with pytest.raises(UserError, match="'text' holds no text in the split 'train'"):
        load(empty, "text")


@pytest.mark.parametrize("is_packed", [False, True])
def test_images_of_one_name_share_their_text(tmp_path, caplog, is_packed):
    for name in ("a", "b"):
        for suffix in ("png", "jpg"):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.{suffix}")
    (tmp_path / "a.txt").write_text("an a")
    (tmp_path / "b.TXT").write_text("a b")
    (tmp_path / "c.txt").write_text("")
    Image.new("RGB", (8, 8)).save(tmp_path / "d.png")
    (tmp_path / "d.png.txt").write_text("a d")
    if is_packed:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for path in sorted(tmp_path.glob("?.*")):
                archive.write(path, path.name)
                path.unlink()
    caplog.set_level("INFO")
    assert load_folder(tmp_path, caption_columns=["txt"])["train"]["txt"] == ["an a", "an a", "a b", "a b", "a d"]
    assert "1 .txt (no images)" in caplog.text and ".TXT" not in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("source", ["txt", "csv", "jsonl", "tar"])
def test_captions_are_read_in_unicode_or_named(source, encoding, tmp_path, caplog):
    folder, texts = save_pictures(tmp_path), {str(n): f"caf\u00e9 {n}" for n in range(4)}
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    if source == "csv":
        lines = ["file_name,txt", *[f"{n}.png,{text}" for n, text in texts.items()]]
        files = {"metadata.csv": "\n".join(lines)}
    elif source == "jsonl":
        lines = [json.dumps({"file_name": f"{n}.png", "txt": text}, ensure_ascii=False) for n, text in texts.items()]
        files = {"metadata.jsonl": "\n".join(lines)}
    else:
        files = {f"{n}.txt": text for n, text in texts.items()}
    for name, text in files.items():
        (folder / name).write_bytes(mark + text.encode(encoding))
    if source == "tar":
        for n in "023":  # or there would be no column
            (folder / f"{n}.txt").write_text(texts[n], encoding="utf-8")
        with tarfile.open(folder / "data.tar", "w") as archive:
            for path in sorted(folder.glob("?.*")):
                archive.add(path, path.name)
                path.unlink()
    if encoding != "cp1252":
        assert load(folder, "txt") == {n: [text] for n, text in texts.items()}
    elif source == "tar":  # where nobody may want the text
        assert load(folder, "txt") == {n: [text] for n, text in texts.items()} | {"1": [""]}
        assert "1.txt of " in caplog.text and "0xe9 at 3 is not UTF-8. Save it as UTF-8" in caplog.text
        assert "1 of 3 images of the split 'train' have no caption" in caplog.text
    else:
        with pytest.raises(UserError, match="cannot be read.*0xe9 at .* is not UTF-8. Save it as UTF-8, .*iconv"):
            load(folder, "txt")
