"""Copies among the images are found and can be left out."""

from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pictures import encoded
from PIL import Image

from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import ConfigError


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
