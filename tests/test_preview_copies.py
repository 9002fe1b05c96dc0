"""Copies among the images are found, near ones too, and images that only resemble each other are none."""

import csv
import io
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pictures import encoded
from PIL import Image

from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, held_out, load_images, near_copies
from dae_diffusers.data.near_copies import first_alike, thumbnail
from dae_diffusers.errors import ConfigError
from dae_diffusers.preview_copies import describe_copies, find_copies
from dae_diffusers.training import preview
from dae_diffusers.training.settings import PreviewConfig


def photograph(seed: int, side: int = 48) -> Image.Image:
    """Smooth colours with an edge, as photographs have."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((side, side), 3)
    image.paste(tuple(random.integers(0, 256, 3).tolist()), (side // 3, side // 2, side // 2, side))
    return image


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """20 photographs in two classes, some twice: as they are, as JPEG, smaller; one in the other class."""
    folder = tmp_path_factory.mktemp("scraped")
    for number in range(20):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        photograph(number).save(folder / "ab"[number % 2] / f"{number:02}.png")
    for number in (0, 2):
        (folder / "a" / f"again-{number:02}.png").write_bytes((folder / "a" / f"{number:02}.png").read_bytes())
    (folder / "b" / "again-04.png").write_bytes((folder / "a" / "04.png").read_bytes())
    photograph(6).save(folder / "a" / "jpeg-06.jpg", quality=75)
    photograph(8).resize((36, 36), 3).save(folder / "a" / "small-08.jpg", quality=90)
    return folder


COPIES = {"again-00": "exact", "again-02": "exact", "again-04": "exact", "jpeg-06": "near", "small-08": "near"}


def test_preview_names_copies_and_shows_them(scraped, tmp_path):
    flags = f"--train_data_dir {scraped} --resolution 32 --output_dir {tmp_path}".split()
    preview.main(parse_config(PreviewConfig, flags))
    text = (tmp_path / "preview.md").read_text()
    rows = list(csv.DictReader((tmp_path / "copies.csv").read_text().splitlines()))
    found = {}
    for row in rows:
        names = {row[column].rpartition("/")[2].partition(".")[0] for column in ("copy", "of")}
        (copy,) = names & COPIES.keys()
        (first,) = names - {copy}
        assert copy.endswith(first)
        found[copy] = row["kind"]
    assert found == COPIES
    assert [row["kind"] for row in rows] == sorted((row["kind"] for row in rows), reverse=True)
    for side, name in (("training", "24 training images"), ("validation", "1 for validation")):
        kinds = [row["kind"] for row in rows if row["side"] == side]
        assert f"| of {name} | {kinds.count('exact')} | {kinds.count('near')} |" in text
    assert "Copies of an image of another class: 1." in text and "--drop_copies" in text
    with Image.open(tmp_path / "copies.png") as picture:
        assert picture.height == 2 * 66 - 2  # two rows of pairs
    preview.main(parse_config(PreviewConfig, [*flags, "--num_compared", "0"]))
    assert not (tmp_path / "copies.png").exists() and not (tmp_path / "copies.csv").exists()
    assert "copies" not in (tmp_path / "preview.md").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_training_images_that_validate_are_counted_apart(scraped, seed, monkeypatch):
    monkeypatch.setattr(held_out, "_SPLIT_SEED", seed)
    train, validation = load_images(DataConfig(train_data_dir=str(scraped), resolution=32, validation_fraction=0.4))
    copies = find_copies(train, validation, 1000)
    sides = [(pair.first.validates, pair.copy.validates) for pair in copies.pairs]
    names = [{images.name_of(n).rpartition("/")[2] for n in range(len(images))} for images in (train, validation)]
    both = [[any(name.startswith((copy, copy[-2:] + ".")) for name in side) for side in names] for copy in COPIES]
    assert not any(first for first, _ in sides)
    assert sum(copy for _, copy in sides) == sum(all(each) for each in both) > 0
    assert copies.num_compared == (len(train), len(validation))
    some = find_copies(train, validation, 5)
    assert some.num_compared == (5, 5) and f"are 5 of {len(train)} training images" in describe_copies(some)


def test_digits_are_no_copies_of_each_other():
    copies = find_copies(*load_images(DataConfig(dataset_name="digits", image_channels=1, resolution=16)), 2000)
    assert not copies.pairs and not copies.unreadable
    assert "No copies among 1500 training images and 297 for validation." in describe_copies(copies)


@pytest.mark.parametrize("quality", [75, 90])
def test_what_was_saved_again_looks_alike_and_nothing_else_does(quality):
    pictures = [photograph(seed) for seed in range(100)]
    again = [Image.open(io.BytesIO(encoded(each, "jpeg", quality=quality))) for each in pictures]
    pixels = [torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1 for each in (*pictures, *again)]
    thumbnails = np.stack([thumbnail(each) for each in pixels])
    assert first_alike(thumbnails).tolist() == [*range(100)] * 2
    assert first_alike(0.02 * thumbnails).tolist() == [*range(100)] * 2  # pale ones are told apart, too


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sorting_finds_what_comparing_all_pairs_finds(channels, monkeypatch):
    random = np.random.default_rng(channels)
    some = random.normal(0, 0.4, (1500, channels, 64)).astype(np.float32)
    copies = some[random.permutation(1500)[:300]]
    noise = random.normal(0, 1, copies.shape) * random.uniform(0, 0.04, (300, 1, 1))  # some are too far away
    both = np.concatenate((some, copies + noise.astype(np.float32)))
    found = first_alike(both)
    monkeypatch.setattr(near_copies, "_FEW", len(both))
    assert found.tolist() == first_alike(both).tolist()
    assert 100 < (found < np.arange(1800)).sum() < 300


def test_a_crowd_of_copies_takes_no_time():
    random = np.random.default_rng(0)
    crowd = random.normal(0, 0.4, (1, 3, 64)) + random.normal(0, 0.01, (4000, 3, 64))
    assert (first_alike(crowd.astype(np.float32)) < np.arange(4000)).mean() > 0.99


def test_images_of_any_size_and_channels_have_thumbnails():
    ramp = torch.linspace(-1, 1, 16).expand(12, 16, 16)
    torch.testing.assert_close(torch.from_numpy(thumbnail(ramp)), ramp[:4, ::2, ::2].flatten(1) + 1 / 15)
    assert thumbnail(ramp[:1, :5, :3]).shape == (1, 64)


def test_unreadable_images_are_counted_and_stop_nothing(scraped, tmp_path):
    folder = shutil.copytree(scraped, tmp_path / "data")
    for name in ("again-00", "again-02"):
        (folder / "a" / f"{name}.png").write_bytes(b"damaged")
    copies = find_copies(*load_images(DataConfig(train_data_dir=str(folder), resolution=32)), 1000)
    assert "Images that cannot be read: 2 of 25. The first: the image " in describe_copies(copies)
    assert {pair.copy.name for pair in copies.pairs} | {pair.first.name for pair in copies.pairs} == {
        str(folder / name)
        for name in ("a/04.png", "b/again-04.png", "a/06.png", "a/jpeg-06.jpg", "a/08.png", "a/small-08.jpg")
    }


def test_rows_of_one_file_are_no_copies_but_links_are(tmp_path):
    rows = []
    for number in range(6):
        photograph(number).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,{word}\n" for word in ("one", "two")]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(rows))
    config = DataConfig(train_data_dir=str(tmp_path), resolution=16, caption_column="text")
    assert not find_copies(*load_images(config), 1000).pairs
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "link.png").hardlink_to(tmp_path / "3.png")
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=16))
    is_trained = any("link" in train.name_of(index) for index in range(len(train)))  # or else both are held out
    assert [pair.is_exact for pair in find_copies(train, validation, 1000).pairs] == [True] * is_trained


def names_of(images) -> set[str]:
    return {"/".join(images.name_of(index).split("/")[-2:]) for index in range(len(images))}


def test_dropping_copies_keeps_the_first_of_each(scraped, caplog):
    caplog.set_level("INFO")
    config = DataConfig(train_data_dir=str(scraped), resolution=16)
    plain, dropped = (load_images(replace(config, drop_copies=drops)) for drops in (False, True))
    names = [set.union(*map(names_of, both)) for both in (plain, dropped)]
    assert names[0] - names[1] == {"a/again-00.png", "a/again-02.png", "b/again-04.png"} and names[1] < names[0]
    assert "left out 3 of 25 training images" in caplog.text
    assert plain[0].fingerprint != dropped[0].fingerprint  # which caches and resumed runs compare


def test_images_of_a_validation_split_are_dropped_from_training(tmp_path, caplog):
    caplog.set_level("INFO")
    pictures = [encoded(photograph(number)) for number in range(6)]
    features = datasets.Features({"image": datasets.Image()})
    for split, numbers in (("train", (0, 1, 2, 3, 1)), ("test", (4, 2, 4))):
        rows = {"image": [{"bytes": pictures[number], "path": None} for number in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    flags = {"dataset_name": str(tmp_path), "resolution": 16}
    assert list(map(len, load_images(DataConfig(**flags)))) == [5, 3]
    assert "1 of 3 images for validation are copies of training images" in caplog.text
    caplog.clear()
    assert list(map(len, load_images(DataConfig(**flags, drop_copies=True)))) == [3, 3]
    assert "left out 2 of 5 training images" in caplog.text and "for validation are copies" not in caplog.text


def test_equal_arrays_are_copies(tmp_path):
    arrays = [np.full((8, 8), number, np.float32).tolist() for number in (0, 1, 2, 1, 3)]
    pq.write_table(pa.table({"image": arrays}), tmp_path / "train.parquet")
    config = DataConfig(
        dataset_name=str(tmp_path), resolution=8, image_channels=1, image_column="image", drop_copies=True
    )
    assert sum(map(len, load_images(config))) == 4


def test_captions_of_one_file_are_kept_when_copies_are_dropped(tmp_path):
    rows = [f"{number}.png,{word}\n" for number in range(4) for word in ("one", "two")]
    for number in range(4):
        photograph(number % 3).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(rows))
    config = DataConfig(train_data_dir=str(tmp_path), resolution=16, caption_column="text", drop_copies=True)
    images = load_images(config)
    assert sum(map(len, images)) == 6 and not any("3.png" in names_of(each) for each in images)


def test_a_model_that_was_trained_without_copies_is_judged_without_them(scraped, tmp_path, caplog):
    (tmp_path / "train_dae").mkdir()
    settings = {"train_data_dir": str(scraped), "seed": 0, "validation_fraction": 0.05, "drop_copies": True}
    (tmp_path / "train_dae" / "config.yaml").write_text(yaml.safe_dump(settings))
    config = DataConfig(train_data_dir=str(scraped), resolution=16)
    load_images(config, model=str(tmp_path / "vae"))
    assert "was trained with `--drop_copies`: other images were held out there" in caplog.text
    caplog.clear()
    load_images(replace(config, drop_copies=True), model=str(tmp_path / "vae"))
    assert caplog.text == ""


def test_streams_drop_no_copies(tmp_path):
    with pytest.raises(ConfigError, match="`drop_copies` does not go with `streaming`"):
        DataConfig(dataset_name=str(tmp_path), streaming=True, drop_copies=True)
