"""Images of one group, such as a patient, are held out together or not at all, whatever reads them."""

import itertools
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from models import save_autoencoder
from pictures import encoded
from PIL import Image
from scripts import BARE_DAE, run
from test_tables import PICTURES, write

from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, ImageDataset, held_out, load_images
from dae_diffusers.data.groups import choose_groups, whole_groups
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.cache import CachedLatents, follow_cache
from dae_diffusers.settings import compose
from dae_diffusers.training import cache_latents, evaluate, preview, train_dae
from dae_diffusers.training.settings import PreviewConfig, TrainDiTConfig
from dae_diffusers.weights import autoencoder_fingerprint

NUMBERS = [number // 4 for number in range(24)]  # four images of each of six patients
PATIENTS = [f"{number:03d}" for number in NUMBERS]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (number,) * 3)


def write_images(folder: Path, patients: list) -> Path:
    """Images of different gray, and a `metadata.csv` that says whose they are."""
    folder.mkdir(exist_ok=True)
    for number in range(len(patients)):
        picture(number).save(folder / f"{number}.png")
    lines = [f"{number}.png,{patient}" for number, patient in enumerate(patients)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,patient", *lines]))
    return folder


def config_of(folder: Path, column: str | None = "patient", **flags) -> DataConfig:
    return DataConfig(**{"train_data_dir": str(folder), "resolution": 16, "group_column": column, **flags})


def numbers_in(images: ImageDataset) -> list[int]:
    return [round((float(images[n]["pixel_values"][0, 0, 0]) + 1) * 127.5) for n in range(len(images))]


def sides_of(config: DataConfig, seed: int = 0) -> list[list[int]]:
    """The numbers of the training images, and of those that are held out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "_SPLIT_SEED", seed)
        return [numbers_in(images) for images in load_images(config)]


@pytest.mark.parametrize(
    "kind", ["names", "whole numbers", "a gap", "table", "gap in a table", "field", "class folders"]
)
def test_no_group_is_on_both_sides(kind, tmp_path, caplog):
    """A third of the images is wanted, as nearly as whole patients allow."""
    caplog.set_level("INFO")
    rows = [{"bytes": encoded(picture(number)), "path": None} for number in range(24)]
    has_gap = "gap" in kind
    flags = {"validation_fraction": 0.3}
    if kind == "class folders":
        for number, patient in enumerate(PATIENTS):
            (tmp_path / patient).mkdir(exist_ok=True)
            picture(number).save(tmp_path / patient / f"{number}.png")
        config = config_of(tmp_path, "label", **flags)
    elif kind in ("table", "gap in a table", "field"):
        patients = [float(number) for number in NUMBERS[:-1]] + [None] if has_gap else NUMBERS
        columns = {"json": [{"patient": name} for name in PATIENTS]} if kind == "field" else {"patient": patients}
        column = "json.patient" if kind == "field" else "patient"
        folder = write(tmp_path, image=rows, **columns)
        config = config_of(tmp_path, column, train_data_dir=None, dataset_name=folder, **flags)
    else:
        patients = {"names": PATIENTS, "whole numbers": NUMBERS, "a gap": [*NUMBERS[:-1], ""]}[kind]
        config = config_of(write_images(tmp_path, patients), **flags)
    for seed in range(3):
        train, held_out = sides_of(config, seed)
        assert sorted(train + held_out) == list(range(24)) and len(held_out) == (7 if has_gap else 8)
        of_train, of_held_out = ({NUMBERS[number] for number in side if number < 23} for side in (train, held_out))
        assert not of_train & of_held_out
        assert sides_of(config, seed) == [train, held_out]  # whichever process or script asks
    assert re.search(r"column \S+: 2 of [67] groups are held out, with [78] of 24 images", caplog.text)
    assert ("is empty in 1 of 24 rows of the split 'train': each of these" in caplog.text) == has_gap


def test_names_are_kept_as_written(tmp_path):
    """007 is another patient than 7."""
    folder = write_images(tmp_path, ["007", "7"] * 4)
    sides = sides_of(config_of(folder, validation_fraction=0.5))
    assert [len({number % 2 for number in side}) for side in sides] == [1, 1]


@pytest.mark.parametrize("wanted", [1, 3, 7, 12, 30, 150])
def test_chosen_groups_come_as_near_as_any(wanted):
    random = np.random.default_rng(wanted)
    for _ in range(30):
        sizes = random.integers(1, 20, random.integers(2, 9))
        wanted = min(wanted, sizes.sum())
        places = choose_groups(sizes, wanted)
        assert 0 < len(set(places)) == len(places) < len(sizes)
        others = (
            sum(each) for number in range(1, len(sizes)) for each in itertools.combinations(sizes.tolist(), number)
        )
        assert abs(sizes[places].sum() - wanted) == min(abs(total - wanted) for total in others)


@pytest.mark.parametrize(("largest", "share"), [(3, 0.5), (40, 0.05), (3000, 0.2)])
def test_a_share_of_many_groups_is_met(largest, share):
    sizes = np.random.default_rng(0).integers(1, largest + 1, 3000)
    wanted = round(share * sizes.sum())
    places = choose_groups(sizes, wanted)
    assert len(set(places)) == len(places) and sizes[places].sum() == wanted
    # They are as large as others: small ones are not preferred.
    assert sizes[places].mean() == pytest.approx(sizes.mean(), rel=0.15)


def test_groups_of_one_image_are_held_out_as_images_are(tmp_path):
    folder = write_images(tmp_path, [f"patient {number}" for number in range(24)])
    for seed in range(3):
        flags = {"validation_fraction": 0.3}
        assert sides_of(config_of(folder, **flags), seed) == sides_of(config_of(folder, None, **flags), seed)


def test_groups_that_share_a_file_are_one_group(tmp_path, caplog):
    caplog.set_level("INFO")
    names, files = ["a", "b", "b", "c", None, "d", "c"], np.array([0, 0, 1, 1, 2, 3, 4])
    assert whole_groups(names, files).tolist() == [0, 0, 0, 0, 1, 2, 0]
    write_images(tmp_path, ["a", "b", "c", "d"])
    with open(tmp_path / "metadata.csv", "a") as file:
        file.write("\n0.png,b")
    for seed in range(4):
        train, held_out = map(set, sides_of(config_of(tmp_path), seed))
        assert len({0, 1} & train) != 1 and not train & held_out
    assert "groups that name the same file are one group" in caplog.text


def test_large_groups_are_said_to_miss_the_share(tmp_path, caplog):
    load_images(config_of(write_images(tmp_path, NUMBERS)))
    assert "17 % of the images are held out instead of 5 % (`--validation_fraction`)" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a"] * 6, "all 6 images of the split 'train' are of one group of `group_column` 'patient', so no group is left"),
        ([["a"]] * 6, "`group_column` 'patient' holds List(Value('string')), not one name or whole number for each image. Name"),
        ([0.5, 1.0] * 3, "`group_column` 'patient' holds 0.5, but groups are names or whole numbers. Name another column, or"),
        (["", None, " "] * 2, "`group_column` 'patient' is empty in the whole split 'train'. Name another column, or leave"),
    ],
)  # fmt: skip
def test_columns_that_are_no_groups_are_said(values, message, tmp_path):
    folder = write(tmp_path, image=PICTURES, patient=values)
    config = DataConfig(dataset_name=folder, resolution=8, group_column="patient")
    with pytest.raises(UserError, match=re.escape(message)):
        load_images(config)
    config.group_column = "patients"
    with pytest.raises(UserError, match=r"\['image', 'patient'\] of the split 'train'. Name .* Did you mean `patient`"):
        load_images(config)
    config.group_column = "image"
    with pytest.raises(UserError, match="`group_column` 'image' is the column of the images"):
        load_images(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"streaming": True}, "`group_column` does not go with `streaming`, .* Leave `streaming` out, or move whole"),
        ({"label_column": "x"}, "`group_column` is 'x', which `label_column` names too"),
        ({"label_column": ["y", "x"]}, "`group_column` is 'x', which `label_column` names too"),
        ({"continuous_columns": ["x"]}, "which `continuous_columns` names too.* leave one of the two out"),
        ({"condition_column": "x"}, "which `condition_column` names too"),
    ],
)
def test_settings_that_do_not_go_with_groups_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(dataset_name="data", group_column="x", **flags)


def test_a_group_is_neither_class_nor_condition(tmp_path):
    names = datasets.ClassLabel(names=["p", "q", "r"])
    features = datasets.Features({"image": datasets.Image(), "patient": names, "label": datasets.Value("string")})
    rows = {"image": [{"bytes": data, "path": None} for data in PICTURES], "patient": [0, 1, 2] * 2}
    table = datasets.Dataset.from_dict({**rows, "label": ["cat", "dog"] * 3}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    for column, id2label in (("patient", {0: "cat", 1: "dog"}), ("label", {0: "p", 1: "q", 2: "r"})):
        for images in load_images(DataConfig(dataset_name=str(tmp_path), resolution=8, group_column=column)):
            assert images.id2label == id2label and images.conditions is None
            assert set(images[0]) == {"pixel_values", "class_labels"}


def test_groups_on_both_sides_of_a_given_split_are_said(tmp_path, caplog):
    write(tmp_path, image=PICTURES, patient=[1, 2, 3, 4, 5, None])
    write(tmp_path, "test", image=PICTURES[:4], patient=["3", "3", "6", None])
    config = DataConfig(dataset_name=str(tmp_path), resolution=8, group_column="patient")
    load_images(config)
    assert (
        "2 of 4 images for validation are of groups with training images, such as '3' (column patient)" in caplog.text
    )
    assert "1 of 4 rows of the split 'test'" in caplog.text and "1 of 6 rows of the split 'train'" in caplog.text
    caplog.clear()
    write(tmp_path, "test", image=PICTURES[:4], patient=["6", "7", "7", "8"])
    load_images(config)
    assert "of groups with training images" not in caplog.text
    write(tmp_path, "test", image=PICTURES[:4])
    with pytest.raises(UserError, match=r"'patient' is not among the columns \['image'\] of the split 'test'"):
        load_images(config)


def test_a_cache_of_another_split_is_refused(tmp_path, caplog):
    vae = save_autoencoder(tmp_path / "vae")
    flags = f"--vae {vae} --train_data_dir {write_images(tmp_path / 'images', NUMBERS)} --group_column patient"
    run(cache_latents, flags, output_dir=tmp_path / "latents")
    own = autoencoder_fingerprint(load_autoencoder(str(vae)))
    for name, number in (("train", 0), ("validation", 1)):
        cache = CachedLatents(tmp_path / "latents" / name)
        cache.check(autoencoder=own, images=load_images(config_of(tmp_path / "images"))[number])
        with pytest.raises(
            UserError, match="Give the images that it was made of, with the same .* `group_column` and `drop_copies`"
        ):
            cache.check(autoencoder=own, images=load_images(config_of(tmp_path / "images", None))[number])
    data = compose(TrainDiTConfig, vae="x", latent_cache="latents", group_column="patient").data
    follow_cache(data, cache)
    assert data.group_column is None and "`--group_column` has no effect beside the latent cache" in caplog.text


@pytest.mark.filterwarnings("ignore:.* images for .* latent elements")
def test_scripts_hold_out_what_a_run_has_held_out(tmp_path, caplog):
    """A resumed run is refused with other groups, and `evaluate` says it."""
    images, folder = write_images(tmp_path / "images", NUMBERS), tmp_path / "run"
    flags = f"{BARE_DAE} --stage 1 --train_data_dir {images} --seed 3"
    run(train_dae, f"{flags} --group_column patient", output_dir=folder)
    again = {"output_dir": folder, "resume_from_checkpoint": "latest"}
    for more in ({}, {"accept_changed_images": "yes"}):
        with pytest.raises(
            UserError, match="was trained with `group_column` patient, but now it is left out. Continue"
        ):
            run(train_dae, flags, **again, **more)
    run(train_dae, f"{flags} --group_column patient", **again)
    caplog.clear()

    trained = load_images(config_of(images))[0].fingerprint
    for column in ("patient", None):
        options = {"vae": folder / "stage1", "output_dir": tmp_path / "evaluation"}
        options |= {} if column is None else {"group_column": column}
        run(evaluate, f"--train_data_dir {images} --seed 3 --lpips_net none", **options)
        assert (trained in (tmp_path / "evaluation" / "metrics.md").read_text()) == (column is not None)
        said = "trained with `--group_column patient`: other images were held out there" in caplog.text
        assert said == (column is None)
    recorded = yaml.safe_load((folder / "train_dae" / "config.yaml").read_text())
    caplog.clear()
    (folder / "train_dae" / "config.yaml").write_text(
        yaml.safe_dump(recorded | {"group_column": None, "validation_fraction": 0.3})
    )
    load_images(config_of(images), model=str(folder / "stage1"))
    assert "was trained with `--validation_fraction 0.3` and without `--group_column`: other images" in caplog.text


def test_preview_counts_the_groups(tmp_path):
    flags = ["--train_data_dir", str(write_images(tmp_path / "images", PATIENTS)), "--resolution", "16"]
    preview.main(
        parse_config(PreviewConfig, [*flags, "--group_column", "patient", "--output_dir", str(tmp_path / "out")])
    )
    table = (tmp_path / "out" / "preview.md").read_text()
    assert "Groups (`patient`) of training images: 5. Of validation images: 1.\n" in table
