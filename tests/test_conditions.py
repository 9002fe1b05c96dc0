"""Conditions: further classes, numbers and images. What is unknown or new adds nothing, and what is given is followed."""

import json

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from models import make_autoencoder, make_random_transformer, save_autoencoder, save_backbone
from PIL import Image
from safetensors.torch import load_file
from scripts import (
    TINY_DIT,
    TRANSFORMER,
    assert_goes_on_exactly,
    assert_same_weights,
    assert_two_processes_equal_one,
    in_child,
    run,
)
from torch.testing import assert_close

from dae_diffusers import DAEDiTImg2ImgPipeline, DAEDiTInterpolationPipeline, DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.autoencoders.loading import spatial_factor
from dae_diffusers.data import DataConfig, condition_images, load_images
from dae_diffusers.data.conditions import numbers_of
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.fitting.decoder_fit import load_generator
from dae_diffusers.fitting.side_by_side import GrowingAutoencoder, assemble
from dae_diffusers.generators.conditions import CONDITION_ARGUMENTS, Conditions, statistics_of
from dae_diffusers.generators.take_over import OldConditions, take_over
from dae_diffusers.generators.warm_start import WarmStart
from dae_diffusers.hub.card import make_card
from dae_diffusers.hub.results import read_result
from dae_diffusers.pipelines import dae_dit
from dae_diffusers.settings import compose
from dae_diffusers.training import cache_latents, evaluate, train_dit
from dae_diffusers.training.settings import TrainDAEConfig, TrainDiTConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

COLUMNS = {
    "angle": {"mean": 30.0, "std": 20.0, "low": 0.0, "high": 60.0},
    "color": {"labels": ["blue", "Red"]},
    "size": {"labels": ["big", "medium", "small"]},
    "temperature": {"mean": 0.0, "std": 1.0, "low": -1.0, "high": 1.0},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty pictures with two class columns, two columns of numbers and a mask each, and an autoencoder."""
    folder = tmp_path_factory.mktemp("conditions")
    (folder / "images" / "masks").mkdir(parents=True)
    random, rows = np.random.default_rng(0), []
    for number in range(20):
        name = f"{number:02d}.png"
        Image.fromarray(random.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(folder / "images" / name)
        Image.fromarray(random.integers(0, 2, (10, 9), dtype=np.uint8) * 255).save(folder / "images" / "masks" / name)
        row = {
            "file_name": name,
            "mask": f"masks/{name}",
            "shape": "ab"[number % 2],
            "color": ["blue", "red", "green"][number % 3],
        }
        rows.append({**row, "angle": 3 * number, "temperature": None if number == 3 else number / 8})
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_autoencoder(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def flags(data):
    return (
        f"{TINY_DIT} --resolution 16 --vae {data / 'vae'} --train_data_dir {data / 'images'} --validation_fraction 0.2 --random_flip "
        "--label_column shape color --continuous_columns temperature angle --condition_column mask --class_dropout_prob 0.3 "
        f"--metric_features {save_backbone(data / 'judge', 'classifier')} --metric_images 10 --metric_steps 99"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run") / "run"
    run(train_dit, flags, output_dir=folder)
    return folder


def random_transformer(**config) -> DAEDiTTransformer2DModel:
    transformer = make_random_transformer(attention_head_dim=8, **config)
    for name, value in transformer.named_parameters():
        if "attribute_embeds" in name:
            value.data[-1] = 0
    return transformer


def make_pipeline(columns=COLUMNS, **config) -> DAEDiTPipeline:
    kinds = {
        "num_attribute_classes": [len(each["labels"]) for _, each in sorted(columns.items()) if "labels" in each]
        or None,
        "num_continuous": sum("mean" in each for each in columns.values()),
        "condition_channels": sum(4 * each["channels"] + 1 for each in columns.values() if "channels" in each),
    }
    vae = make_autoencoder(sample_size=16).to_diffusers()
    parts = {"id2label": {0: "cat", 1: "dog"}, "conditions": columns, "label_column": "shape"}
    pipeline = DAEDiTPipeline(
        random_transformer(num_classes=2, **kinds, **config), vae, FlowMatchEulerDiscreteScheduler(), **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, *args, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": generator} | kwargs
    return pipeline(*args, **given).images


def test_unknown_conditions_add_nothing_and_neither_do_those_that_are_new_to_a_model():
    model = random_transformer(num_attribute_classes=[2, 3], num_continuous=2, condition_channels=5)
    plain = random_transformer()
    model.load_state_dict(plain.state_dict(), strict=False)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]))
    unknown = {
        "attribute_labels": torch.tensor([[2, 3], [2, 3]]),
        "continuous": torch.full((2, 2), torch.nan),
        "condition_image": torch.zeros(2, 5, 8, 8),
    }
    known = {
        "attribute_labels": torch.tensor([[0, 3], [2, 1]]),
        "continuous": torch.tensor([[1.5, torch.nan], [torch.nan, -1]]),
    }
    known["condition_image"] = torch.randn(2, 5, 8, 8)
    expected = plain(*inputs).sample
    assert torch.equal(model(*inputs, **unknown).sample, expected) and torch.equal(model(*inputs).sample, expected)
    for name, value in known.items():
        difference = (model(*inputs, **{name: value}).sample - expected).flatten(1).abs().amax(1)
        assert (difference > 1e-3).all(), name
    conditions = OldConditions([(None, [None] * 2), (None, [None] * 3)], [None, None], image_channels=5)
    new, _ = take_over(plain, sample_size=8, in_channels=3, patch_size=2, rows=None, conditions=conditions)
    assert torch.equal(new(*inputs, **known).sample, expected)
    # They learn nevertheless: of each the last layer has a gradient, and an unknown class none.
    new(*inputs, **known).sample.square().sum().backward()
    parts = [*new.attribute_embeds, *(each.linear_2 for each in new.continuous_embeds), new.condition_embed]
    assert all(part.weight.grad.abs().max() > 0 for part in parts)
    assert not new.attribute_embeds[0].weight.grad[-1].any()


def test_new_layer_of_a_condition_image_is_said():
    old, sizes = random_transformer(condition_channels=5), {"sample_size": 8, "in_channels": 3, "rows": None}
    for patch_size, is_new in ((2, False), (1, True)):
        new, changes = take_over(old, **sizes, patch_size=patch_size, conditions=OldConditions(image_channels=5))
        assert ("the layer of its condition image is new" in changes) == is_new
        assert new.condition_embed.weight.any() != is_new
    without, changes = take_over(old, **sizes, patch_size=2)  # it is dropped, as a resumed run does again
    assert without.condition_embed is None and changes == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"attribute_labels": torch.zeros(2, 2, dtype=int)},
            r"`attribute_labels` has shape \(2, 2\), but must be \(2, 1\)",
        ),
        ({"continuous": torch.zeros(2, 1)}, "`continuous` was given, but this transformer takes none"),
        ({"condition_image": torch.zeros(2, 5, 4, 4)}, r"`condition_image` has shape .*, but must be \(2, 5, 8, 8\)"),
    ],
)
def test_conditions_that_do_not_fit_the_transformer_are_named(given, message):
    model = random_transformer(num_attribute_classes=[2], condition_channels=5)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2), **given)


def test_conditions_mean_the_same_in_every_form():
    pipeline = make_pipeline()
    expected = sample(pipeline, "dog", conditions={"color": "red", "angle": 45}, guidance_scale=3)
    for given in (
        {"class_labels": {"shape": ["dog"], "color": ["Red"]}, "conditions": {"angle": np.float32(45)}},
        {
            "class_labels": 1,
            "conditions": {"color": 1, "angle": torch.tensor([45.0]), "temperature": None, "size": [None]},
        },
    ):
        assert torch.equal(sample(pipeline, guidance_scale=3, **given), expected)
    for change in ({"color": "blue"}, {"angle": 44}, {"angle": None}, {"size": "big"}, {"temperature": 0.0}):
        other = sample(pipeline, "dog", conditions={"color": "red", "angle": 45, **change}, guidance_scale=3)
        assert not torch.equal(other, expected)
    for change in ({"class_labels": 0}, {"guidance_scale": 1}):
        given = {"class_labels": 1, "guidance_scale": 3, **change}
        assert not torch.equal(sample(pipeline, conditions={"color": "red", "angle": 45}, **given), expected)
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    several = {"class_labels": "dog", "conditions": {"angle": [0, 45], "color": "red"}, "guidance_scale": 3}
    images = sample(pipeline, **several, num_images_per_label=2, generator=generators)
    alone = sample(
        pipeline,
        "dog",
        conditions={"angle": 45, "color": "red"},
        guidance_scale=3,
        generator=generators[3].manual_seed(3),
    )
    assert_close(images[3:], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(
        sample(pipeline, guidance_scale=3), sample(pipeline, conditions={"angle": None}, guidance_scale=1)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conditions": {"weight": 1}}, "`conditions` has `weight`, but this pipeline draws from `angle`, `color`, `size`, `temperature`"),
        ({"class_labels": {"colour": "red"}}, "`class_labels` has `colour`, but this pipeline draws from `shape`, `angle`"),
        ({"conditions": [1, 2]}, "`conditions` is a list, but must map names to values. This pipeline draws from `angle`, `color`"),
        ({"conditions": {"color": "gren"}}, "`gren` is not one of the 2 classes of `color`. Nearest: "),
        ({"conditions": {"color": 3}}, "`3` is not one of the 2 classes of `color`"),
        ({"conditions": {"color": 1.0}}, "`1.0` is not one of the 2 classes of `color`"),
        ({"conditions": {"angle": "30"}}, "`angle` is '30', but must be a number"),
        ({"conditions": {"angle": float("nan")}}, "`angle` is nan, but must be finite; None stands for unknown"),
        ({"conditions": {"angle": [1, 2], "color": ["red"] * 3}}, "`conditions` has 2 of `angle` and 3 of others"),
        ({"class_labels": [0, 1], "conditions": {"angle": [1, 2, 3]}}, r"`class_labels`, `conditions` number \[2, 3\]"),
        ({"class_labels": {"color": "red"}, "conditions": {"color": "red"}}, "`color` is in `class_labels` and in `conditions`"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_draw_from_is_named(given, message):
    with pytest.raises(ValueError, match=message) as error:
        sample(make_pipeline(), **given)
    assert "\n" not in str(error.value)


def test_numbers_beyond_those_of_training_are_warned_of():
    column = COLUMNS["angle"]
    pipeline = make_pipeline()
    with pytest.warns(
        UserWarning, match=f"`angle` is .*, but the training images have {column['low']:g} to {column['high']:g}"
    ):
        sample(pipeline, conditions={"angle": column["high"] + 1})
    sample(pipeline, conditions={"angle": [column["low"], column["high"]]})


def test_pipeline_and_transformer_of_other_conditions_are_refused():
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match=r"`conditions` are \[2, 3\] classes, 1 numbers and 0 channels"):
        columns = {name: each for name, each in COLUMNS.items() if name != "angle"}
        DAEDiTPipeline(**pipeline.components | {"conditions": columns})
    with pytest.raises(ValueError, match="but this pipeline has no conditions"):
        sample(make_pipeline({}), conditions={"angle": 1})


def test_decoder_of_larger_images_does_not_replace_that_of_condition_images(tmp_path):
    pipeline = make_pipeline({"mask": {"channels": 1, "value_range": None}})
    model = make_autoencoder(sample_size=16)
    for name, widths in {"larger": (8, 8), "x2": (8, 8, 8)}.items():
        model.with_decoder(
            decoder_block_out_channels=widths, decoder_layers_per_block=2
        ).to_diffusers().save_pretrained(tmp_path / name)
    pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(
        UserError, match="x2 does not fit the generator .* 17 channels of an image, but .* 5. .* 4x4 pixels of a latent"
    ):
        assemble(tmp_path / "pipeline", tmp_path / "x2", tmp_path / "pipeline")
    assert DAEDiTPipeline.from_pretrained(tmp_path / "pipeline").vae_scale_factor == 2
    assemble(tmp_path / "pipeline", tmp_path / "larger", tmp_path / "pipeline")
    assert "Asymmetric" in type(DAEDiTPipeline.from_pretrained(tmp_path / "pipeline").vae).__name__
    model.save_pretrained(tmp_path / "stage1")
    model.with_decoder(decoder_block_out_channels=(8, 8, 8)).to_diffusers().save_pretrained(tmp_path / "vae")
    growing = GrowingAutoencoder(str(tmp_path / "stage1"), tmp_path, torch.device("cpu"))
    assert [spatial_factor(growing.newest(of_same_size=same)) for same in (False, True)] == [4, 2]


def test_pipelines_made_from_it_take_conditions():
    pipeline = make_pipeline()
    image = torch.rand(2, 3, 16, 16)
    changing = DAEDiTImg2ImgPipeline.from_pipe(pipeline)
    changing.set_progress_bar_config(disable=True)
    given = {"class_labels": {"shape": "cat", "color": "red"}, "conditions": {"angle": [0.0, 60.0]}}
    whole = sample(changing, image=image, strength=1, **given)
    assert torch.equal(whole, sample(pipeline, **given))
    series = DAEDiTInterpolationPipeline.from_pipe(pipeline)
    series.set_progress_bar_config(disable=True)
    drawn = sample(series, num_images=3, **given)
    for index, angle in ((0, 0.0), (2, 60.0)):
        alone = sample(pipeline, class_labels=given["class_labels"], conditions={"angle": angle})
        assert_close(drawn[index], alone[0], atol=1e-4, rtol=1e-4)
    assert not torch.equal(drawn[1], drawn[0])
    for values in ([None, 60.0], [0.0, None]):  # an unknown end is guided, too, if the other is known
        drawn = sample(series, num_images=2, conditions={"angle": values}, guidance_scale=3)
        for end, value in enumerate(values):
            assert_close(
                drawn[end], sample(pipeline, conditions={"angle": value}, guidance_scale=3)[0], atol=1e-4, rtol=1e-4
            )


def test_a_series_between_images_has_the_size_of_its_latents():
    series = DAEDiTInterpolationPipeline.from_pipe(make_pipeline({"mask": {"channels": 1, "value_range": None}}))
    series.set_progress_bar_config(disable=True)
    options = {
        "conditions": {"mask": list(torch.rand(2, 1, 24, 16))},
        "latents": torch.randn(1, 3, 12, 8),
        "num_images": 2,
    }
    expected = sample(series, **options)
    assert torch.equal(expected, sample(series, **options, height=24, width=16))
    options["conditions"] = {"mask": torch.stack(options["conditions"]["mask"])[:, None]}  # a batch
    assert torch.equal(expected, sample(series, **options))


def test_result_draws_from_conditions_in_all_three_ways(trained):
    folder = str(trained / "pipeline")
    pipeline = DAEDiTPipeline.from_pretrained(folder)
    assert pipeline.label_column == "shape" and pipeline.conditions.keys() == {"color", "angle", "temperature", "mask"}
    assert pipeline.conditions["mask"] == {"channels": 1, "value_range": None}
    assert pipeline.conditions["color"] == {"labels": ["blue", "green", "red"]}
    assert pipeline.transformer.config.num_attribute_classes == [3] and pipeline.transformer.config.num_continuous == 2
    alone = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    given = {
        "class_labels": {"shape": "a", "color": "green"},
        "conditions": {"angle": 21.5, "mask": Image.new("1", (7, 7), 1)},
    }
    images = []
    for each in (pipeline, alone, DAEDiTPipeline(**pipeline.components)):
        each.set_progress_bar_config(disable=True)
        images.append(sample(each, **given))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert (trained / "train_dit" / "grids" / "samples-00000006.png").exists()


@pytest.mark.filterwarnings("ignore:4 images for")
def test_samples_are_measured_with_the_conditions_of_the_data(trained, data, tmp_path):
    measured = (
        f"--pipeline {trained / 'pipeline'} --features {data / 'judge'} --guidance_scales 2 --num_inference_steps 1"
    )
    images = f"--train_data_dir {data / 'images'} --validation_fraction 0.2 --lpips_net none"
    with pytest.raises(
        UserError,
        match="the pipeline draws from angle, color, mask, temperature, but the images come with angle besides",
    ):
        run(evaluate, f"{measured} {images} --label_column shape --continuous_columns angle", output_dir=tmp_path)
    run(evaluate, f"{measured} {images}", output_dir=tmp_path)  # the pipeline knows the columns
    (row,) = json.loads((tmp_path / "metrics.json").read_text())["generation"]
    assert row["gfd_judge"] > 0 and row["num_images"] == 16 and "conditions" not in row


def test_numbers_are_normalised_and_dropped_alone_and_together(data):
    config = DataConfig(
        train_data_dir=str(data / "images"), resolution=16, label_column=["shape", "color"],
        continuous_columns=["temperature", "angle"], condition_column="mask",
    )  # fmt: skip
    images = load_images(config)
    conditions = Conditions(images, 2)
    (rows, _), train = conditions.add_to(*images), images[0].conditions
    assert images[0].labels is not None and images[0].id2label == {0: "a", 1: "b"}
    batch = rows.__getitems__([*range(len(rows))])
    angles, temperatures = batch["continuous"].unbind(1)
    assert_close(
        angles,
        (torch.tensor(train.numbers["angle"]) - conditions.config["angle"]["mean"]) / conditions.config["angle"]["std"],
    )
    assert abs(angles.mean()) < 1e-5 and abs(angles.std(correction=0) - 1) < 1e-5
    assert temperatures.isnan().tolist() == [value is None for value in train.numbers["temperature"]]
    assert batch["attribute_labels"][:, 0].tolist() == train.labels["color"]
    many = {
        name: value[:1].expand(4000, *value.shape[1:]) for name, value in batch.items() if name in CONDITION_ARGUMENTS
    }
    torch.manual_seed(0)
    together = torch.arange(4000) < 1000
    given = conditions.dropped(many, together, 0.25)
    is_without_image = given["condition_image"].flatten(1).abs().amax(1, keepdim=True) == 0
    unknown = torch.cat((given["attribute_labels"] == 3, given["continuous"].isnan(), is_without_image), dim=1)
    assert unknown[:1000].all()
    assert_close(unknown[1000:].float().mean(0), torch.full((4,), 0.25), atol=0.03, rtol=0)
    assert 0.28 < (~unknown[1000:]).all(1).float().mean() < 0.36  # each alone: 0.75 ** 4


def test_resumed_run_equals_an_uninterrupted_one(trained, flags):
    assert_goes_on_exactly(in_child, train_dit, flags, trained, 3, TRANSFORMER)


def test_two_processes_equal_one_that_accumulates(trained, flags, tmp_path):
    assert_two_processes_equal_one(train_dit, flags, tmp_path, TRANSFORMER)


def test_conditions_beside_cached_latents_train_the_same_transformer(trained, data, flags, tmp_path):
    images = f"--train_data_dir {data / 'images'} --label_column shape --validation_fraction 0.2 --random_flip --dtype float32 --resolution 16"
    run(cache_latents, f"{images} --vae {data / 'vae'}", output_dir=tmp_path / "cache")
    run(train_dit, flags, output_dir=tmp_path / "run", latent_cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "conditions").rglob("*.safetensors"))) == 2
    assert_same_weights(
        load_file(trained / TRANSFORMER), load_file(tmp_path / "run" / TRANSFORMER), rtol=1e-3, atol=1e-4
    )


def test_run_does_not_go_on_with_other_columns(trained, flags):
    with pytest.raises(UserError, match="was trained with `continuous_columns` temperature angle, but now it is angle"):
        run(train_dit, flags.replace("temperature angle", "angle"), output_dir=trained, resume_from_checkpoint="latest")


def test_card_says_what_it_draws_from(trained):
    result = read_result(trained)
    card = make_card(result, "user/conditions", data_pictures=False)
    record = json.loads((trained / "train_dit" / "run.json").read_text())["conditions"]
    mean = result.index["conditions"]["angle"]["mean"]
    assert (
        "`angle` (a number, 0 to 57 in training), `color` (one of 3 classes: blue, green, red), `mask` (a gray image)"
        in card.text
    )
    example = 'class_labels="b", conditions={{"angle": {angle}, "color": "{color}", "mask": load_image("mask.png"), '
    assert example.format(angle=mean, color="blue") in card.text  # of no image of the data
    assert "from diffusers.utils import load_image\n\npipe" in card.text
    assert "samples.png" not in card.text  # it shows masks of the data
    text = make_card(result, "user/conditions", data_pictures=True).text
    assert "images/samples.png" in text and example.format(**record) in text


# Condition images


def save_gradients(folder, conditions, *, size=(41, 35), count=4, suffix="png", column="mask"):
    """Pictures that are red by column and green by row, with a condition each, which `conditions(number, red, green)` makes."""
    (folder / "masks").mkdir(parents=True)
    rows = []
    for number in range(count):
        red, green = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 250, size[1]))
        image = np.stack((red, green, np.full_like(red, 60 * number)), axis=-1).round().astype(np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
        condition, path = conditions(number, red, green), folder / "masks" / f"{number}.{suffix}"
        np.save(path, condition) if suffix == "npy" else condition.save(path)
        rows.append({"file_name": f"{number}.png", column: f"masks/{number}.{suffix}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def loaded(folder, column="mask", **config):
    config = {"resolution": 16, "condition_column": column, "validation_fraction": 0.25} | config
    images, validation = load_images(DataConfig(train_data_dir=str(folder), **config))
    (rows, _) = Conditions((images, validation), 2).add_to(images, validation)
    return images, rows


def pixels_of_condition(batch: dict, factor: int = 2) -> torch.Tensor:
    grid = batch["condition_image"]
    assert (grid[:, -1] == 1).all()
    return torch.nn.functional.pixel_shuffle(grid[:, :-1], factor)


GEOMETRIES = [
    {},
    {"random_flip": True, "random_crop": True},
    {"random_flip": True, "random_resized_crop": 0.3},
    {"random_vertical_flip": True, "random_quarter_turn": True},
    {"pad": "black", "random_flip": True},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_condition_and_image_stay_aligned(tmp_path, geometry):
    def colour(number, red, green):
        return Image.fromarray(np.stack((red, green, np.full_like(red, 60 * number)), axis=-1).round().astype(np.uint8))

    def positions(number, red, green):
        return np.stack((red, green), axis=-1)[::2, ::2].astype(np.float32)  # half as large

    def sides(number, red, green):  # two values, twice as large
        return Image.fromarray(((red > 125) * 255).astype(np.uint8).repeat(2, 0).repeat(2, 1))

    items = [*range(3), *((n, draw) for n in range(3) for draw in range(16))]
    images, rows = loaded(save_gradients(tmp_path / "colour", colour), **geometry)
    batch = rows.__getitems__(items)
    assert (
        len(images) == 3 and images.id2label is None and torch.equal(pixels_of_condition(batch), batch["pixel_values"])
    )
    _, rows = loaded(save_gradients(tmp_path / "positions", positions, suffix="npy"), **geometry)
    batch = rows.__getitems__(items)
    assert_close(pixels_of_condition(batch), batch["pixel_values"][:, :2], atol=0.12, rtol=0)  # two of 35 pixels
    _, rows = loaded(save_gradients(tmp_path / "sides", sides), **geometry)
    batch = rows.__getitems__(items)
    mask, red = pixels_of_condition(batch), batch["pixel_values"][:, :1]
    assert set(mask.unique().tolist()) == {-1, 1} and mask.shape[1] == 1
    assert ((mask > 0) == (red > 0.0))[(red.abs() > 0.06)].all()


def test_data_and_pipeline_take_the_same_images_for_masks():
    assert condition_images.FEW_VALUES == dae_dit.FEW_VALUES


def test_condition_of_many_values_is_smooth_and_one_of_few_keeps_them(tmp_path):
    def noise(number, red, green):
        return Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64), dtype=np.uint8))

    def ids(number, red, green):
        return Image.fromarray((np.random.default_rng(number).integers(0, 16, (64, 64)) * 16).astype(np.uint8))

    _, rows = loaded(save_gradients(tmp_path / "noise", noise, size=(64, 64)))
    assert pixels_of_condition(rows.__getitems__([0, 1])).std() < 0.3  # the mean of sixteen
    _, rows = loaded(save_gradients(tmp_path / "ids", ids, size=(64, 64)))
    values = (pixels_of_condition(rows.__getitems__([0, 1])) + 1) * 127.5
    assert_close(values, (values / 16).round() * 16, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "highest", "suffix", "is_warned_of"),
    [(np.uint8, 5, "png", True), (np.uint16, 5, "png", True), (np.uint8, 255, "png", False), (np.uint8, 5, "npy", False)],
)  # fmt: skip
def test_condition_images_of_class_numbers_are_warned_of(tmp_path, caplog, dtype, highest, suffix, is_warned_of):
    def ids(number, red, green):
        array = (red > 125).astype(dtype) * dtype(highest)
        return array if suffix == "npy" else Image.fromarray(array)

    loaded(save_gradients(tmp_path / "ids", ids, suffix=suffix))
    assert (f"masks/1.{suffix} in the column 'mask', have no value above 5" in caplog.text) == is_warned_of


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: Image.new("RGB", (41, 35), (9, 0, 0)).save(folder / "masks" / "3.png"), "masks/3.png in the column 'mask' is in colour, but the first one there is gray"),
        (lambda folder: (folder / "masks" / "3.png").write_bytes(b"x"), "masks/3.png in the column 'mask' cannot be decoded"),
        (lambda folder: (folder / "masks" / "3.png").unlink(), "`condition_column` names masks/3.png, which is no image in"),
        (lambda folder: (folder / "metadata.jsonl").unlink(), "`condition_column` 'mask' is not among the columns .*'image'"),
    ],
)  # fmt: skip
def test_condition_images_that_cannot_be_used_are_named(tmp_path, break_it, message):
    folder = save_gradients(tmp_path / "x", lambda *_: Image.new("L", (41, 35), 200))
    break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        for images in load_images(DataConfig(train_data_dir=str(folder), resolution=16, condition_column="mask")):
            images.condition_images.__getitems__([*range(len(images))])
    assert "\n" not in str(error.value)


def test_bad_condition_images_are_skipped_with_their_images(tmp_path):
    folder = save_gradients(tmp_path / "x", lambda *_: Image.new("L", (41, 35), 200), count=8)
    (folder / "masks" / "0.png").write_bytes(b"x")
    config = {"resolution": 16, "condition_column": "mask", "on_bad_image": "skip", "max_bad_image_share": 0.9}
    images = load_images(DataConfig(train_data_dir=str(folder), validation_fraction=0.25, **config))
    assert sum(map(len, images)) == 7
    for each in images:
        each.condition_images.__getitems__([*range(len(each))])


def test_condition_images_mean_the_same_in_every_form():
    pipeline = make_pipeline({"mask": {"channels": 1, "value_range": None}})
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, :8] = 255
    picture = Image.fromarray(mask)
    expected = sample(pipeline, 1, conditions={"mask": picture}, guidance_scale=3)
    assert_close(expected, expected)
    as_tensor = torch.tensor(mask / 255, dtype=torch.float32)
    same = (
        mask,
        mask[..., None] / 255,
        picture.convert("1"),
        picture.convert("RGB"),
        as_tensor,
        as_tensor[None, None],
        [picture],
    )
    for each in (
        *same,
        picture.resize((32, 32), Image.Resampling.NEAREST),
        picture.resize((8, 8), Image.Resampling.NEAREST),
    ):
        assert torch.equal(sample(pipeline, 1, conditions={"mask": each}, guidance_scale=3), expected)
    assert not torch.equal(sample(pipeline, 1, conditions={"mask": 255 - mask}, guidance_scale=3), expected)
    without = sample(pipeline, 1, conditions={"mask": None}, guidance_scale=3)
    assert not torch.equal(without, expected)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    both = sample(pipeline, 1, conditions={"mask": [picture, None]}, guidance_scale=3, generator=generators)
    assert_close(both, torch.cat((expected, without)), atol=1e-4, rtol=1e-4)
    wide = sample(pipeline, 1, conditions={"mask": picture}, height=16, width=24)
    assert wide.shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"this pipeline draws from an image, `mask`: pass `conditions=\{'mask': image\}`, or None for no image"),
        ({"conditions": {"mask": Image.new("RGB", (16, 16), (9, 0, 0))}}, "`mask` has 3 channels, but must be gray, as in training. Convert it with"),
        ({"conditions": {"mask": "mask.png"}}, "`mask` is a str, but must be a picture, an array, a tensor"),
        ({"conditions": {"mask": np.full((16, 16), 3.0)}}, r"`mask` has numbers from 3 to 3, but must lie in \[0, 1\]"),
        ({"conditions": {"mask": []}}, "`mask` is empty"),
    ],
)  # fmt: skip
def test_condition_images_that_a_pipeline_cannot_take_are_named(given, message):
    with pytest.raises(ValueError, match=message) as error:
        sample(make_pipeline({"mask": {"channels": 1, "value_range": None}}), **given)
    assert "\n" not in str(error.value)


def predict(model, **conditions):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        return model.eval()(torch.randn(1, 3, 8, 8, generator=generator), torch.tensor([300]), **conditions).sample


def test_known_conditions_keep_their_weights_and_new_ones_begin_at_nothing(caplog):
    caplog.set_level("INFO")
    columns = {**COLUMNS, "mask": {"channels": 1, "value_range": None}}
    old = make_pipeline(columns)
    known = {
        "attribute_labels": torch.tensor([[1, 2]]),
        "continuous": torch.tensor([[0.5, -1.0]]),
        "condition_image": torch.randn(1, 5, 8, 8),
    }
    expected = predict(old.transformer, **known)
    start = WarmStart.from_pipeline("old", old)
    wanted = {
        **columns, "age": COLUMNS["angle"], "color": {"labels": ["green", "Red", "blue"]}, "size": COLUMNS["size"],
        "angle": {**COLUMNS["angle"], "mean": 5.0}, "kind": {"labels": ["x", "y"]},
    }  # fmt: skip
    new = start.continued(8, 3, 2, {0: "cat", 1: "dog"}, conditions=wanted, condition_channels=5)
    assert new.config.num_attribute_classes == [3, 2, 3] and new.config.num_continuous == 3
    same = {**known, "attribute_labels": torch.tensor([[1, 1, 2]]), "continuous": torch.tensor([[3.0, 0.5, -1.0]])}
    assert torch.equal(predict(new, **same), expected)
    green = {**same, "attribute_labels": torch.tensor([[0, 0, 2]])}
    unknown = {**known, "attribute_labels": torch.tensor([[2, 2]])}
    assert torch.equal(predict(new, **green), predict(make_pipeline(columns).transformer, **unknown))
    assert (
        "condition color has other classes; condition age is new; condition kind is new; all else is as before"
        in caplog.text
    )
    # All are left out: it goes on as if they were unknown. All are new: they add nothing.
    plain = WarmStart.from_pipeline("old", make_pipeline(columns)).continued(8, 3, 2, {0: "cat", 1: "dog"})
    assert torch.equal(predict(plain), predict(make_pipeline(columns).transformer))
    assert "its condition mask is left out" in caplog.text
    again = WarmStart.from_pipeline("old", make_pipeline({})).continued(
        8, 3, 2, {0: "cat", 1: "dog"}, conditions=columns, condition_channels=5
    )
    assert torch.equal(predict(again, **known), predict(make_pipeline({}).transformer))


def test_numbers_of_given_weights_keep_their_statistics(data):
    config = DataConfig(train_data_dir=str(data / "images"), resolution=16, continuous_columns=["angle"])
    conditions = Conditions(load_images(config), 2, COLUMNS)
    assert conditions.config == {"angle": COLUMNS["angle"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "2"], "'x' holds Value.'string'., not numbers"),
        ([True, False], "'x' holds Value.'bool'., not numbers"),
        ([[1.0], [2.0]], "'x' holds List.*, not numbers"),
        ([1.0, float("nan")], "'x' holds nan in 1 of 2 rows of the split 'train'. Leave such values empty"),
        ([1.0, float("-inf")], "'x' holds -inf in 1 of 2 rows"),
    ],
)
def test_columns_that_hold_no_numbers_are_named(values, message):
    with pytest.raises(UserError, match=message):
        numbers_of(datasets.Dataset.from_dict({"x": values}), "x", "train")


def test_number_that_never_changes_is_refused():
    with pytest.raises(UserError, match="'x' holds the same number, 2, for all training images"):
        statistics_of("x", [2.0, None, 2.0])
    with pytest.raises(UserError, match="'x' holds no number for all"):
        statistics_of("x", [None])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"continuous_columns": ["x"], "streaming": True}, "`continuous_columns` cannot be used with `streaming`"),
        ({"label_column": ["x", "y"], "streaming": True}, "several columns in `label_column` cannot be used with `streaming`"),
        ({"condition_column": "x", "dataset_name": None, "latent_cache": "c"}, "`condition_column` needs the images' data set"),
        ({"condition_column": "x", "latent_cache": "c", "random_crop": True}, "they give other images than those in it"),
        ({"label_column": ["x", "y"], "continuous_columns": ["x"]}, "the columns x y x hold 'x' twice"),
        ({"label_column": ["none", "y"]}, "the columns none y hold 'none' beside others"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_used_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        compose(TrainDiTConfig, **{"vae": "x", "dataset_name": "user/data", **given})


def test_missing_columns_are_named(data):
    images = {"train_data_dir": str(data / "images"), "resolution": 16}
    for given in (
        {"continuous_columns": ["weight"]},
        {"label_column": ["shape", "weight"]},
        {"condition_column": "weight"},
    ):
        with pytest.raises(
            UserError, match=f"`{next(iter(given))}` 'weight' is not among the columns .* of the split 'train'"
        ):
            load_images(DataConfig(**images, **given))
    with pytest.raises(UserError, match="`condition_column` 'image' is the column of the images"):
        load_images(DataConfig(**images, condition_column="image"))
    with pytest.raises(UserError, match="`condition_column` 'angle' holds .*, not images"):
        load_images(DataConfig(**images, condition_column="angle"))


def test_stock_transformer_and_stage_3_take_no_conditions(trained):
    sizes = {"sample_size": 8, "in_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    stock = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=2)
    with pytest.raises(UserError, match="DiTTransformer2DModel, which draws by one class only. Leave `angle` out"):
        WarmStart("old", stock, None).continued(8, 3, 2, {0: "a", 1: "b"}, conditions={"angle": COLUMNS["angle"]})
    config = compose(TrainDAEConfig, stage="3", pipeline=str(trained / "pipeline"), dataset_name="digits")
    with pytest.raises(UserError, match="draws from `angle`, `color`, `mask`, `temperature`, which stage 3 cannot do"):
        load_generator(config)


def save_lit_halves(folder):
    """Pictures of 8 pixels whose halves are bright and dark: which, the mask says, and how much, the number `light`."""
    (folder / "images" / "masks").mkdir(parents=True)
    rows = []
    for number, (mask, light) in enumerate((mask, light) for mask in halves() for light in np.linspace(0, 120, 16)):
        name = f"{number:02d}.png"
        lit_half(mask, light).convert("RGB").save(folder / "images" / name)
        mask.save(folder / "images" / "masks" / name)
        rows.append({"file_name": name, "mask": f"masks/{name}", "light": light})
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vae = make_autoencoder(sample_size=8).to_diffusers()
    torch.nn.init.zeros_(vae.quant_conv.weight[3:])  # latents without noise
    torch.nn.init.constant_(vae.quant_conv.bias[3:], -30)
    vae.save_pretrained(folder / "vae")
    return f"--vae {folder / 'vae'} --train_data_dir {folder / 'images'} --resolution 8"


def halves() -> list[Image.Image]:
    left = np.zeros((8, 8), np.uint8)
    left[:, :4] = 255
    return [Image.fromarray(np.ascontiguousarray(each)) for each in (left, left[:, ::-1], left.T, left.T[::-1])]


def lit_half(mask: Image.Image, light: float) -> Image.Image:
    return Image.fromarray((127.5 + light * (np.asarray(mask) / 127.5 - 1)).round().astype(np.uint8))


def test_tiny_model_follows_a_number_and_a_mask(tmp_path):
    flags = (
        "--model DiT-Ti/2 --num_layers 2 --num_attention_heads 2 --attention_head_dim 16 --train_batch_size 32 --max_train_steps 400 "
        "--learning_rate 1e-2 --lr_warmup_steps 5 --ema_decay 0.9 --validation_steps 999 --checkpointing_steps 999 --num_sample_images 1 "
        "--sample_steps 1 --continuous_columns light --condition_column mask"
    )
    run(train_dit, f"{flags} {save_lit_halves(tmp_path)}", output_dir=tmp_path / "run")
    pipeline = DAEDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    lights = [0, 30, 60, 90, 120]
    cases = [(mask, light) for mask in halves() for light in lights]
    given = {"mask": [mask for mask, _ in cases], "light": [light for _, light in cases]}
    drawn = sample(pipeline, conditions=given, num_images_per_label=3, guidance_scale=1, num_inference_steps=8)
    drawn = drawn.unflatten(0, (4, 5, 3)).mean(2)
    to_latents = DAEDiTImg2ImgPipeline.from_pipe(pipeline)
    right = to_latents.encode_pixels(
        to_latents.prepare_images([lit_half(*case).convert("RGB") for case in cases], 8, 8)
    )
    right = right.unflatten(0, (4, 5))
    axis = right[:, -1:] - right[:, :1]  # of each mask, from no light to the most
    followed, wanted = (
        (((each - right[:, :1]) * axis).flatten(2).sum(2) / axis.square().flatten(2).sum(2)).mean(0)
        for each in (drawn, right)  # wanted: 0, 0.81, 0.94, 0.99, 1: the encoder hardly tells bright lights apart
    )
    assert (followed.diff() > 0).all() and followed[0] < 0.4 and followed[-1] > 0.6
    assert (followed[:3].diff() > 0.05).all() and (followed - wanted).abs().max() < 0.3
    nearest = torch.cdist(drawn[:, 2:].flatten(2).flatten(0, 1), right[:, -1].flatten(1)).argmin(1)
    assert torch.equal(nearest, torch.arange(4).repeat_interleave(3))
