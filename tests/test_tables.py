"""Data sets that are tables: what holds images and labels, which files they may name, and what is said when they fail."""

import os
import re
from pathlib import PurePosixPath

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_data import encoded

from dae_diffusers.data import DataConfig, held_out, load_images, make_pass_loader
from dae_diffusers.data.tables import load_tables
from dae_diffusers.errors import UserError
from dae_diffusers.randomness import derived_seed

PICTURES = [encoded(Image.new("RGB", (8, 8), (40 * number, 0, 0))) for number in range(6)]


def write(folder, split="train", **columns) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return str(folder)


def load(folder, **flags):
    train, validation = load_images(DataConfig(dataset_name=str(folder), resolution=8, **flags))
    parts = [(images, n) for images in (train, validation) for n in range(len(images))]
    values = [round((float(images[n]["pixel_values"][0, 0, 0]) + 1) * 127.5) // 40 for images, n in parts]
    return train, sorted(values)


def save_files(folder):
    (folder / "files").mkdir(parents=True)
    for number, data in enumerate(PICTURES):
        (folder / "files" / f"{number}.png").write_bytes(data)
    return [f"files/{number}.png" for number in range(6)]


@pytest.mark.parametrize(
    "kind", ["bytes", "struct", "paths", "csv", "csv in brackets", "jsonl", "saved", "saved splits", "saved as arrow", "saved with its labels as torch", "train_data_dir"]
)  # fmt: skip
def test_tables_of_every_kind_are_read(kind, tmp_path):
    folder = tmp_path / ("a [b] *" if "brackets" in kind else "data")
    names = save_files(folder)
    labels = ["a", "b"] * 3
    if kind in ("bytes", "train_data_dir"):
        write(folder / "table", image=PICTURES, label=labels)
        folder = folder / "table"
    elif kind == "struct":
        write(folder, photo=[{"bytes": data, "path": None} for data in PICTURES], label=labels)
    elif kind == "paths":
        write(folder, image=names, text=["no picture"] * 6, label=labels)
    elif "csv" in kind:
        lines = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
        (folder / "all.csv").write_text("\n".join(["file,label", *lines]))
    elif kind == "jsonl":
        lines = [f'{{"image": "{name}", "label": "{label}"}}' for name, label in zip(names, labels, strict=True)]
        (folder / "all.jsonl").write_text("\n".join(lines))
    else:
        rows = datasets.Dataset.from_dict({"image": [str(folder / name) for name in names], "label": labels})
        rows = rows.cast_column("image", datasets.Image())
        rows = datasets.DatasetDict({"train": rows}) if "splits" in kind else rows
        if " as " in kind:
            rows = rows.with_format(kind.split()[-1], columns=["label"] if "labels" in kind else None)
        folder = tmp_path / "saved"
        rows.save_to_disk(folder)
    if kind == "train_data_dir":
        train, _ = load_images(DataConfig(train_data_dir=str(folder), resolution=8))
    else:
        train, values = load(folder)
        assert values == list(range(6))
    assert train.id2label == {0: "a", 1: "b"}


def test_words_for_nothing_are_texts_in_a_csv(tmp_path):
    words, names = ["None", "NA", "null", "nan", "n/a", ""], save_files(tmp_path)
    lines = [f"{name},{word},{number or ''}" for number, (name, word) in enumerate(zip(names, words, strict=True))]
    (tmp_path / "all.csv").write_text("\n".join(["image,text,angle", *lines]))
    rows = load_tables(tmp_path, [PurePosixPath("all.csv")], streaming=False)["train"]
    assert rows["text"] == [*words[:5], None] and rows["angle"] == [None, 1, 2, 3, 4, 5]


def test_words_for_nothing_among_numbers_are_none_in_a_csv(tmp_path):
    cells = ["1.5", "NA", "nan", "", "-2e1", "null"]
    lines = [f"{name},{cell}" for name, cell in zip(save_files(tmp_path), cells, strict=True)]
    (tmp_path / "all.csv").write_text("\n".join(["image,angle", *lines]))
    rows = load_tables(tmp_path, [PurePosixPath("all.csv")], streaming=False)["train"]
    assert rows["angle"] == [1.5, None, None, None, -20.0, None]


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("training_set/train", "training_set/validation"),
        ("training/train", "training/val"),
        ("train/0", "test/0"),
        ("a/train_1", "b/training/val_1"),
        ("train/data-00000-of-00001", "test/data-00000-of-00001"),
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("images", "test"),
    ],
)
def test_name_of_a_table_says_its_split_before_its_folder_does(train, validation, tmp_path, caplog):
    for number, name in enumerate((train, validation)):
        write((tmp_path / name).parent, (tmp_path / name).name, image=PICTURES[2 * number : 2 * number + 2])
    splits = load_tables(tmp_path, [PurePosixPath(f"{name}.parquet") for name in (train, validation)], streaming=False)
    for number, rows in enumerate((splits.pop("train"), *splits.values())):
        assert rows["image"] == PICTURES[2 * number : 2 * number + 2]
    assert ("1 of 2 tables" in caplog.text) == (train == "images")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["valid"], 1), (["dev", "test"], 1), (["test", "dev"], 2), (["eval"], 1), (["extra", "test"], 2), (["extra"], 0)],
)
@pytest.mark.parametrize("is_saved", [False, True])
def test_split_of_a_usual_name_is_that_of_validation(names, expected, is_saved, tmp_path, caplog):
    caplog.set_level("INFO")
    splits = {name: PICTURES[2 * number : 2 * number + 2] for number, name in enumerate(["train", *names])}
    if is_saved:
        features = datasets.Features({"image": datasets.Image()})
        rows = {name: datasets.Dataset.from_dict({"image": some}, features) for name, some in splits.items()}
        datasets.DatasetDict(rows).save_to_disk(tmp_path)
    for name, some in ({} if is_saved else splits).items():
        write(tmp_path, f"{name}-00000-of-00001", image=some)
    _, validation = load_images(DataConfig(dataset_name=str(tmp_path), resolution=8))
    value = round((float(validation[0]["pixel_values"][0, 0, 0]) + 1) * 127.5) // 40
    assert value // 2 == expected
    unused = sorted(name for number, name in enumerate(names) if number + 1 != expected)
    assert (f"splits that are not used: {', '.join(unused)}" in caplog.text) == bool(unused)


def test_table_of_several_splits_is_refused_beside_others(tmp_path):
    write(tmp_path, "train_val", image=PICTURES)
    assert load(tmp_path)[1] == list(range(6))
    write(tmp_path, "train", image=PICTURES)
    with pytest.raises(UserError, match="train_val.parquet names several splits .train, validation.. Rename"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["link.png", "../secret.png", "{secret}", "file://{secret}", "/dev/zero", "pipe.png"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_name_files_inside_their_folder_only(path, streaming, tmp_path):
    """What they name elsewhere is a bad image: named, or skipped."""
    secret, folder = tmp_path / "secret.png", tmp_path / "data"
    secret.write_bytes(PICTURES[5])
    items = [{"bytes": data, "path": None} for data in PICTURES[:5]]
    items.append({"bytes": None, "path": path.format(secret=secret)})
    write(folder, image=items)
    (folder / "link.png").symlink_to(secret)
    os.mkfifo(folder / "pipe.png")
    flags = {"dataset_name": str(folder), "resolution": 8, "streaming": streaming, "validation_fraction": 0.4}
    with pytest.raises(
        UserError, match="cannot be decoded .(its path .* leads out of the data set|it is a device or a pipe)"
    ):
        for images in load_images(DataConfig(**flags)):
            list(make_pass_loader(images, batch_size=2))
    train, validation = load_images(DataConfig(**flags, on_bad_image="skip", max_bad_image_share=1.0))
    batches = [batch for images in (train, validation) for batch in make_pass_loader(images, batch_size=9)]
    values = [
        round((float(value) + 1) * 127.5) // 40 for batch in batches for value in batch["pixel_values"][:, 0, 0, 0]
    ]
    assert set(values) == set(range(5))


def test_image_comes_before_other_columns_with_images(tmp_path):
    white = [encoded(Image.new("RGB", (8, 8), "white"))] * 6
    assert load(write(tmp_path / "a", annotation=white, image=PICTURES))[1] == list(range(6))
    assert load(write(tmp_path / "b", left=white, right=PICTURES), image_column="right")[1] == list(range(6))
    with pytest.raises(UserError, match=r"several columns hold images: \['left', 'right'\]. .*`image_column`"):
        load(tmp_path / "b")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([2, 0, 1] * 2, {0: "0", 1: "1", 2: "2"}),
        ([1.0, 0.0] * 3, {0: "0", 1: "1"}),
        (["10", "9"] * 3, {0: "9", 1: "10"}),
        ([True, False] * 3, {0: "False", 1: "True"}),
    ],
)
def test_column_called_label_holds_classes(labels, classes, tmp_path):
    train, values = load(write(tmp_path, image=PICTURES, label=labels))
    assert train.id2label == classes and values == list(range(6))
    for number in range(len(train)):
        value = round((float(train[number]["pixel_values"][0, 0, 0]) + 1) * 127.5) // 40
        label = labels[value]
        name = str(int(label)) if isinstance(label, float) else str(label)
        assert classes[train.labels[number]] == name


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0.5, 0.25] * 3, "must hold integers or strings without gaps"), ([None] * 6, "holds no values")],
)
def test_column_called_label_without_classes_is_said(labels, message, tmp_path):
    folder = write(tmp_path, image=PICTURES, label=pa.array(labels, pa.float64()))
    with pytest.raises(UserError, match=f"'label' {message}.*`none`"):
        load(folder)
    assert load(folder, label_column="none")[0].id2label is None


def test_table_without_images_beside_images_is_left_out(tmp_path, caplog):
    save_files(tmp_path)
    (tmp_path / "stats.json").write_text('[{"mean": 1.5}]')
    assert load(tmp_path)[1] == list(range(6)) and "are left out" in caplog.text


def test_many_different_strings_are_not_taken_for_classes(tmp_path):
    folder = write(tmp_path, image=PICTURES[:1] * 120, label=[f"caption {n}" for n in range(120)])
    with pytest.raises(UserError, match="114 different values for 114 images.*`label_column label`"):
        load(folder)
    assert len(load(folder, label_column="label")[0].id2label) == 120


def test_labels_in_a_field_of_a_column(tmp_path):
    folder = write(tmp_path, image=PICTURES, json=[{"label": "ab"[n % 2], "size": n} for n in range(6)])
    assert load(folder, label_column="json.label")[0].id2label == {0: "a", 1: "b"}
    with pytest.raises(UserError, match="`label_column` 'json.kind' is not among"):
        load(folder, label_column="json.kind")


@pytest.mark.parametrize(
    ("labels", "of_test", "message"),
    [
        (
            [0, 1] * 3,
            ["a", "b"],
            "holds integers for the training images, but texts for those of validation. Write the classes",
        ),
        (
            [0.0, 1.0, None, 1.0, 0.0, 1.0],
            [0.0, 1.0],
            "holds none in 1 of 6 rows of the split 'train'. Leave the unlabelled",
        ),
        (
            [0.0, 1.0, float("nan"), 1.0, 0.0, 1.0],
            [0.0, 1.0],
            "holds none in 1 of 6 rows of the split 'train'. Leave the unlabelled",
        ),
        ([0.0, 0.5, 1.0, 1.0, 0.0, 1.0], [0.0, 1.0], "such as 0.5; `none`"),
        (
            ["a", "b", "a", "b", "a", None],  # the image that is held out
            None,
            "none in 1 of 1 rows of the held-out part of the split 'train'. Leave the unlabelled",
        ),
    ],
)
def test_labels_that_do_not_fit_are_said(labels, of_test, message, tmp_path):
    folder = write(tmp_path, image=PICTURES, label=pa.array(labels))
    if of_test is not None:
        write(tmp_path, "test", image=PICTURES[:2], label=of_test)
    with pytest.raises(UserError, match=re.escape(message)):
        load_images(DataConfig(dataset_name=folder, resolution=8))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("test_labels", [{"label": [-1] * 6}, {}])
def test_unlabelled_test_split_is_named_and_a_part_can_be_held_out(test_labels, streaming, tmp_path):
    folder = write(tmp_path, image=PICTURES, label=[0, 1] * 3)
    write(tmp_path, "test", image=PICTURES, **test_labels)
    flags = {"streaming": streaming} | ({"num_classes": 2} if streaming else {})
    with pytest.raises(UserError, match="split 'test'.*`validation_split train`"):
        load_images(DataConfig(dataset_name=folder, resolution=8, **flags))
    train, validation = load_images(
        DataConfig(dataset_name=folder, resolution=8, validation_split="train", validation_fraction=0.34, **flags)
    )
    assert len(validation) == 2
    assert sum(len(batch["class_labels"]) for batch in make_pass_loader(train, batch_size=4)) == 4


@pytest.mark.parametrize("kind", ["metadata", "paths", "bytes"])
def test_rows_of_one_file_are_on_one_side(kind, tmp_path, caplog, monkeypatch):
    """Tables of captions often have one caption a row. No held-out image is a training image."""
    caplog.set_level("INFO")
    folder, names, texts = tmp_path / "data", save_files(tmp_path / "data"), [f"caption {n}" for n in range(18)]
    if kind == "bytes":
        write(folder, image=[{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(PICTURES)] * 3, text=texts)
    elif kind == "paths":
        write(folder, image=names * 3, text=texts)
    else:
        lines = [f"{name},{text}" for name, text in zip(names * 3, texts, strict=True)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    flags = {"train_data_dir" if kind == "metadata" else "dataset_name": str(folder)}
    for seed in range(3):
        monkeypatch.setattr(held_out, "_SPLIT_SEED", seed)
        config = DataConfig(**flags, caption_column="text", resolution=8, validation_fraction=0.34)
        train, validation = load_images(config)
        seen = [{text for (text,) in images.captions} for images in (train, validation)]
        assert len(train) == 12 and len(validation) == 6 and seen[0] | seen[1] == set(texts)
        files = [{images.name_of(n) for n in range(len(images))} for images in (train, validation)]
        assert len(files[0]) == 4 and len(files[1]) == 2 and not files[0] & files[1]
    assert "18 rows name 6 files" in caplog.text


def test_links_are_held_out_with_their_file(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    names = save_files(tmp_path)
    for number, name in enumerate(names):
        (tmp_path / "files" / f"soft{number}.png").symlink_to(f"{number}.png")
        (tmp_path / "files" / f"hard{number}.png").hardlink_to(tmp_path / name)
    for seed in range(3):
        monkeypatch.setattr(held_out, "_SPLIT_SEED", seed)
        config = DataConfig(train_data_dir=str(tmp_path), resolution=8, validation_fraction=0.34)
        both = load_images(config)
        seen = [{float(images[n]["pixel_values"][0, 0, 0]) for n in range(len(images))} for images in both]
        assert [len(images) for images in both] == [12, 6] and not seen[0] & seen[1]
    assert "12 files are links to others" in caplog.text


@pytest.mark.parametrize("kind", ["files", "bytes", "no copies"])
def test_held_out_copies_of_training_images_are_said(kind, tmp_path, caplog):
    names = [tmp_path / name for name in save_files(tmp_path)]
    if kind == "files":
        for number, name in enumerate(names):
            (tmp_path / "files" / f"copy{number}.png").write_bytes(name.read_bytes())
    elif kind == "bytes":
        write(tmp_path / "table", image=PICTURES * 2)
    flags = {"dataset_name": str(tmp_path / "table")} if kind == "bytes" else {"train_data_dir": str(tmp_path)}
    load_images(DataConfig(**flags, resolution=8))
    assert ("1 of 1 images for validation are copies of training images" in caplog.text) == (kind != "no copies")


def test_copies_in_a_split_of_pictures_are_said(tmp_path, caplog):
    features = datasets.Features({"image": datasets.Image()})
    for split in ("train", "validation"):
        rows = {"image": [{"bytes": data, "path": None} for data in PICTURES]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    load_images(DataConfig(dataset_name=str(tmp_path), resolution=8))
    assert "6 of 6 images for validation are copies of training images" in caplog.text


@pytest.mark.parametrize("name", ["image.bmp", None])
def test_pictures_of_one_name_are_files_of_their_own(name, tmp_path, caplog):
    """They are held out as they always were, whatever the rows are called."""
    caplog.set_level("INFO")
    pictures = [encoded(Image.new("RGB", (8, 8), (n, 0, 0)), "bmp") for n in range(40)]
    folder = write(tmp_path, image=[{"bytes": data, "path": name} for data in pictures])
    split = load_images(DataConfig(dataset_name=folder, resolution=8, validation_fraction=0.25))
    order = np.random.default_rng(derived_seed(0, 2)).permutation(40)
    for images, expected in zip(split, (order[10:], np.sort(order[:10])), strict=True):
        values = [float(images[n]["pixel_values"][0, 0, 0]) * 127.5 + 127.5 for n in range(len(images))]
        assert [round(value) for value in values] == expected.tolist()
    assert "rows name" not in caplog.text


def write_classes(folder, split, classes, names=None):
    """Pictures whose classes `y` and `z` are names, or the ids of a `ClassLabel` with `names`."""
    feature = datasets.Value("string") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "y": feature, "z": feature})
    images = [{"bytes": data, "path": None} for data, _ in zip(PICTURES, classes, strict=False)]
    rows = datasets.Dataset.from_dict({"image": images, "y": classes, "z": classes}, features=features)
    rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", [["c", "a"], None])
def test_splits_with_other_class_ids_have_the_same_classes(names, streaming, tmp_path):
    """The ids of a `ClassLabel` are those of its split: only its names are the same in both."""
    write_classes(tmp_path, "train", ["a", "b", "c"] * 2, ["b", "a", "c"])
    folder = write_classes(tmp_path, "test", ["c", "a", "c"], names)
    columns = {"label_column": "y"} if streaming else {"label_column": ["y", "z"]}
    _, validation = load_images(DataConfig(dataset_name=folder, resolution=8, streaming=streaming, **columns))
    assert [validation.id2label[label] for label in validation.labels] == ["c", "a", "c"]
    if not streaming:
        names = validation.conditions.names["z"]
        assert [names[label] for label in validation.conditions.labels["z"]] == ["c", "a", "c"]


@pytest.mark.parametrize("names", [["b", "d"], None])
def test_class_of_validation_images_alone_is_a_class(names, tmp_path, caplog):
    """As it is if the classes are strings in both splits. A stream is not read in advance, and its classes are fixed."""
    caplog.set_level("INFO")
    write_classes(tmp_path, "train", ["c", "b"] * 3, ["c", "b"])
    config = {"dataset_name": write_classes(tmp_path, "test", ["b", "d"], names), "label_column": "y", "resolution": 8}
    train, validation = load_images(DataConfig(**config))
    assert train.id2label == validation.id2label == {0: "c", 1: "b", 2: "d"} and validation.labels == [1, 2]
    assert "without training images: d" in caplog.text
    with pytest.raises(UserError, match="'y' holds 'd', which is no class of the training images: 1 of 2 rows of the"):
        load_images(DataConfig(**config, streaming=True))


@pytest.mark.parametrize(("names", "expected"), [(["2", "0"], [2, 0]), (["two", "none"], [0, 1])])
def test_names_that_are_numbers_are_the_numbers_of_training(names, expected, tmp_path):
    write(tmp_path, image=PICTURES, y=[0, 1, 2] * 2)
    folder = write_classes(tmp_path, "test", names, names)
    assert load_images(DataConfig(dataset_name=folder, label_column="y", resolution=8))[1].labels == expected


def test_causes_are_said(tmp_path, monkeypatch):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text('image,label\na.png,1\n"b.png\n')
    with pytest.raises(
        UserError, match="while generating the dataset; because: .*EOF inside string.*The folder holds 1 .csv"
    ):
        load(tmp_path / "csv")
    folder = write(tmp_path / "parquet", image=PICTURES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match="HF_HOME"):
        load(folder)
    assert len(load_images(DataConfig(dataset_name="digits", image_channels=1))[0]) == 1500  # needs no cache
    (tmp_path / "file.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; give the folder"):
        load(tmp_path / "file.parquet")


def test_home_is_found_in_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DataConfig(train_data_dir="~/images")
    assert config.train_data_dir == str(tmp_path / "images")
    assert DataConfig(dataset_name="~/table").dataset_name == str(tmp_path / "table")


def test_range_is_a_property_of_the_images(tmp_path):
    arrays = [np.full((8, 8, 1), number, np.float32).tolist() for number in range(6)]
    features = datasets.Features({"image": datasets.Array3D((8, 8, 1), "float32")})
    datasets.Dataset.from_dict({"image": arrays}, features=features).to_parquet(tmp_path / "train.parquet")
    config = {"dataset_name": str(tmp_path), "resolution": 8, "image_channels": 1}
    train, validation = load_images(DataConfig(**config), value_range=[0.0, 10.0])  # of the autoencoder
    assert train.value_range == validation.value_range == train.choose(2).value_range == [0, 10]
    train, _ = load_images(DataConfig(**config, value_range=[-5.0, 5.0]), value_range=[0.0, 10.0])
    assert train.value_range == [-5, 5]
    train, validation = load_images(DataConfig(**config))
    assert train.value_range == validation.value_range and train[0]["pixel_values"].abs().max() <= 1
    stream, _ = load_images(DataConfig(**config, streaming=True), value_range=[0.0, 10.0])
    assert stream.value_range == [0, 10]
    assert load_images(DataConfig(dataset_name="digits", image_channels=1))[0].value_range is None
