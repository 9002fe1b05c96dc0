"""A preview shows what training gets, from every source of images."""

import logging
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from models import save_autoencoder
from pictures import encoded
from PIL import Image

from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.arrays import save_value_range
from dae_diffusers.data.conditions import ConditionColumns
from dae_diffusers.preview import captions, conditions, counts, draw, look, of_each_class, sizes
from dae_diffusers.training import preview
from dae_diffusers.training.settings import PreviewConfig


def test_preview_writes_a_picture_and_a_table(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name, number in (("wide", 6), ("tall", 4)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(number):
            pixels = np.full((20, 40, 3), 200, np.uint8)
            pixels[:, 10:30] = (20, 200, 20)  # the square that a centre crop keeps
            pixels = pixels if name == "wide" else pixels.transpose(1, 0, 2)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    flags = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "32", "--num_images", "3"]
    out = tmp_path / "data" / "out"
    for _ in range(2):  # what the first leaves in the images' folder is no image
        preview.main(parse_config(PreviewConfig, [*flags, "--output_dir", str(out)]))
    table = (out / "preview.md").read_text()
    training = {
        line.split("|")[1].strip(): int(line.split("|")[2])
        for line in table.splitlines()
        if "%" in line and "|" in line
    }
    assert 8 <= sum(training.values()) < 10 and training["tall"] <= 4 and training["wide"] <= 6
    assert (
        "are smaller than 32x32 pixels" in table and "keeps 50% of the area" in table and table.strip() in caplog.text
    )
    picture = np.asarray(Image.open(out / "preview.png").convert("RGB"))
    tiles = picture[2:94, -92:-2]  # the last column of the first row: a tall one, which fills the height
    darkened = (tiles == np.array((70, 70, 70))).all(axis=-1).mean()
    assert 0.2 < darkened < 0.3  # half of the picture, which fills half of its tile


def test_preview_takes_the_flags_of_training(image_folder, tmp_path, capsys, caplog):
    """Also the side of the autoencoder, which has 16 pixels, and the names of recipes; wrong flags are still refused."""
    caplog.set_level(logging.INFO)
    source = f"--train_data_dir {image_folder} --output_dir {tmp_path / 'out'}"
    flags = f"--config photos_cpu {source} --stage1_steps 9 --no_warm_start_decoder --block_out_channels 8 8"
    config = parse_config(PreviewConfig, flags.split())
    assert config.data.resolution == 64 and config.data.random_flip and not hasattr(config, "stage1_steps")
    flags = f"{source} --vae {save_autoencoder(tmp_path / 'vae')} --model DiT-Ti/2 --max_train_steps 5 --latent_cache x"
    preview.main(parse_config(PreviewConfig, flags.split()))
    assert "images have 16x16 pixels, as the trained model knows them" in caplog.text
    with pytest.raises(SystemExit):
        parse_config(PreviewConfig, f"{source} --stage1_step 9".split())
    assert "unknown flag `--stage1_step`. Did you mean `--stage1_steps`?" in capsys.readouterr().err


def test_preview_maps_values_as_the_autoencoder_does(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "data").mkdir()
    for number in range(4):
        np.save(tmp_path / "data" / f"{number}.npy", np.full((16, 16, 3), 20.0 * number, np.float32))
    vae = save_autoencoder(tmp_path / "vae")
    save_value_range([0.0, 200.0], Path(vae))
    flags = f"--train_data_dir {tmp_path / 'data'} --vae {vae} --output_dir {tmp_path / 'out'}"
    preview.main(parse_config(PreviewConfig, flags.split()))
    assert "image values [0, 200] are mapped to [-1, 1]" in caplog.text


def test_training_row_is_what_training_gets():
    config = DataConfig(dataset_name="digits", resolution=16, image_channels=1, random_flip=True)
    train, validation = load_images(config)
    chosen = of_each_class(train, 0, 2)
    assert list(chosen) == list(range(10)) and all(len(each) == 2 for each in chosen.values())
    for label, seen in chosen.items():
        assert all(each.label == label and each.pixel_values.shape == (1, 16, 16) for each in seen)
    assert draw(chosen, train.id2label, shows_crop=True).height == 20 * 98 - 2
    lines = counts(train, validation, []).splitlines()
    assert [int(line.split("|")[2]) for line in lines[2:-1]] == [train.labels.count(label) for label in range(10)]


def test_arrays_and_streams_have_a_preview(tmp_path):
    (tmp_path / "arrays").mkdir()
    for number in range(4):
        np.save(tmp_path / "arrays" / f"{number}.npy", np.full((12, 8, 5), 100.0 * number, np.float32))
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path / "arrays"), resolution=8, image_channels=5))
    chosen = of_each_class(train, 0, 9)
    assert set(chosen) == {None} and len(chosen[None]) == len(train) == 3
    draw(chosen, None, shows_crop=False)
    assert "No classes. Training images: 3" in counts(train, validation, [])
    assert "All 3 files have 12x8 pixels. The crop keeps 67% of the area" in sizes([*look(train, 0, range(3))])


def test_streams_are_counted_as_far_as_they_were_read(tmp_path):
    rows = [{"image": Image.new("L", (8, 8), number), "label": number % 2} for number in range(30)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train-0.parquet")
    config = DataConfig(dataset_name=str(tmp_path), streaming=True, image_channels=1, resolution=8)
    train, validation = load_images(config)
    looked = list(look(train, 0))
    assert len(looked) > 20 and torch.isfinite(looked[0].pixel_values).all()
    chosen = of_each_class(train, 0, 2)
    assert {label: len(each) for label, each in chosen.items()} == {0: 2, 1: 2}
    assert f"(of the first {len(looked)})" in counts(train, validation, looked)


def test_bad_images_of_a_stream_are_passed_over(tmp_path):
    images = [encoded(Image.new("RGB", (8, 8), (number, 0, 0))) for number in range(8)]
    images[5] = b"damaged"
    datasets.Dataset.from_dict({"image": images}).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(
        dataset_name=str(tmp_path), streaming=True, resolution=8, on_bad_image="skip", max_validation_samples=2
    )
    train, _ = load_images(config)
    assert len(list(look(train, 0))) == 5


def test_preview_says_what_the_range_leaves_nothing_of(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(4):
        values = np.random.default_rng(number).uniform(0, 1, (8, 8, 2)) * (100, 0.1)
        np.save(tmp_path / "data" / f"{number}.npy", values.astype(np.float32))
    flags = f"--train_data_dir {tmp_path / 'data'} --resolution 8 --image_channels 2 --output_dir {tmp_path / 'out'}"
    preview.main(parse_config(PreviewConfig, flags.split()))
    assert "\nOf 2 channels these use less than 1 % of the range" in (tmp_path / "out" / "preview.md").read_text()


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_without_images_take_no_place(tmp_path, streaming):
    rows = [{"image": Image.new("L", (8, 8), number), "label": 20 + number % 14} for number in range(42)]
    names = [f"c{number}" for number in range(40)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train-0.parquet")
    flags = {"streaming": streaming, "validation_split": "train", "max_validation_samples": 2}
    images = load_images(DataConfig(dataset_name=str(tmp_path), image_channels=1, resolution=8, **flags))[0]
    chosen = of_each_class(images, 0, 2)
    assert list(chosen) == list(range(20, 32)) and all(chosen.values())
    assert draw(chosen, images.id2label, shows_crop=True).height == 24 * 98 - 2


def test_preview_shows_conditions_as_training_gets_them(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(8):
        ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (20, 1))  # what a flip turns round
        Image.fromarray(np.stack([ramp] * 3, axis=2)).save(folder / f"{number}.png")
        Image.fromarray(ramp).save(folder / f"mask-{number}.png")
        rows.append(f"{number}.png,mask-{number}.png,{'red' if number < 3 else 'blue'},{number}\n")
    (folder / "metadata.csv").write_text("file_name,mask,colour,angle\n" + "".join(rows))
    flags = f"--train_data_dir {folder} --resolution 16 --random_flip --label_column colour --continuous_columns angle"
    flags = f"{flags} --condition_column mask --num_images 4 --output_dir {tmp_path / 'out'}"
    config = parse_config(PreviewConfig, flags.split())
    preview.main(config)
    assert "| angle | " in (tmp_path / "out" / "preview.md").read_text()
    train, _ = load_images(config.data)
    seen = [each for of_class in of_each_class(train, 0, 4).values() for each in of_class]
    directions = {float((each.pixel_values[0, 0, -1] - each.pixel_values[0, 0, 0]).sign()) for each in seen}
    assert directions == {-1.0, 1.0}  # some are flipped
    for each in seen:
        torch.testing.assert_close(each.condition, each.pixel_values[:1])
    picture = draw(of_each_class(train, 0, 4), train.id2label, shows_crop=True)
    assert picture.height == 6 * 98 - 2  # for each of two classes: files, images, conditions


def test_further_labels_and_numbers_are_counted():
    columns = ConditionColumns({"colour": [0, 1, 1]}, {"colour": ["red", "blue"]}, {"angle": [1.0, None, 4.0]})
    text = conditions(SimpleNamespace(conditions=columns))
    assert "| red | 1 |\n| blue | 2 |" in text and "| angle | 1 | 2.5 | 4 | 1 |" in text
    assert conditions(SimpleNamespace(conditions=None)) == ""


def test_captions_are_counted_and_shown():
    texts = [["a red apple", "fruit"], ["fruit"], [""], ["fruit", "a pear that lies on a table"]]
    images = SimpleNamespace(captions=texts, config=DataConfig(caption_column=["text", "more"]))
    text = captions(images)
    assert (
        "Captions (`text`, `more`): 0 to 2 for each image, 1 to 7 words long (median 1). 1 of 4 images have none."
        in text
    )
    assert "Of 5 captions 3 are different; 3 images share 'fruit'." in text
    assert sorted(text.splitlines()[-3:]) == [
        "- a red apple / fruit",
        "- fruit",
        "- fruit / a pear that lies on a table",
    ]
    assert captions(SimpleNamespace(captions=None)) == ""
    assert captions(SimpleNamespace(captions=[[""], [""]])) == "\nNone of the 2 images has a caption.\n"
