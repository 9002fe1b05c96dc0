"""What the layout of a folder says of splits and classes."""

import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import encoded
from PIL import Image

from dae_diffusers.data import DataConfig, archives, load_images, make_pass_loader
from dae_diffusers.data.classes import Classes
from dae_diffusers.data.columns import column_values, find_image_column
from dae_diffusers.data.contents import read_content
from dae_diffusers.data.folders import load_folder
from dae_diffusers.data.tables import load_tables
from dae_diffusers.errors import UserError


@pytest.fixture
def make_folder(tmp_path):
    """Makes files of these names, each with a content of its own."""

    def make(*names):
        root = tmp_path / "my [new] images"
        for number, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".npy":
                np.save(path, np.full((4, 4, 1), number, np.float32))
            elif path.suffix.lower() in (".png", ".jpg"):
                Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
            else:
                path.write_text("neither an image nor a shard")
        return root

    return make


def write_shard(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(size):
            data = encoded(Image.new("RGB", (4, 4), (number, 0, 0)))
            member = tarfile.TarInfo(f"{path.stem}{number}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.png", "2.PNG", "old train 3.png"], {"train": None}),
        (["bus/1.png", "car/2.png", "train/3.png"], {"train": ["bus", "car", "train"]}),
        (["bus/test_1.png", "car/train_1.png", "bus/2.jpg"], {"train": ["bus", "bus", "car"]}),
        (["bus/2020/1.png", "bus/2021/1.png", "car/2020/1.png"], {"train": ["bus", "bus", "car"]}),
        (["dogs/1.npy", "cats/2.npy", "cats/.3.npy"], {"train": ["cats", "dogs"]}),
        (["only/1.png", "only/2.png"], {"train": None}),
        (["1.png", "more/2.png"], {"train": None}),
        (["train/1.png", "test/2.png", "notes/read.txt"], {"train": None, "test": None}),
        (
            ["Train/a/1.png", "Train/b/2.png", "val/b/3.png", "valid/a/4.png"],
            {"train": ["a", "b"], "validation": ["b", "a"]},
        ),
        (["train/a/1.npy", "train/b/2.npy", "test/b/3.npy"], {"train": ["a", "b"], "test": ["b"]}),
        ([".cache/1.png", "a/1.png", "b/1.png", "__MACOSX/1.png"], {"train": ["a", "b"]}),
        (["test/1.png", "dev/2.png"], {"train": ["dev", "test"]}),
        (["data/train/a/1.png", "data/train/b/2.png", "data/test/b/3.png"], {"train": ["a", "b"], "test": ["b"]}),
        (["all/images/a/1.png", "all/images/b/2.png"], {"train": ["a", "b"]}),
        (["train/train/a/1.png", "train/train/b/2.png", "test/test/b/3.png"], {"train": ["a", "b"], "test": ["b"]}),
        (["train/x/y/a/1.png", "train/x/y/b/2.png", "test/x/y/b/3.png"], {"train": ["a", "b"], "test": ["b"]}),
        (["train/images/1.png", "test/images/2.png"], {"train": None, "test": None}),
        (["train/a/1.png", "test/b/2.png"], {"train": ["a"], "test": ["b"]}),
        (["train2017/1.png", "train2017/2.png", "val2017/3.png"], {"train": None, "validation": None}),
        (
            ["D_train_HR/D_train_HR/a/1.png", "D_train_HR/D_train_HR/b/2.png", "D_valid_HR/D_valid_HR/b/3.png"],
            {"train": ["a", "b"], "validation": ["b"]},
        ),
        (["steam train/1.png", "toy train/2.png"], {"train": ["steam train", "toy train"]}),
        (["toy train/1.png", "test tube/2.png", "bus/3.png"], {"train": ["bus", "test tube", "toy train"]}),
    ],
)
def test_layout_says_splits_and_classes(make_folder, names, expected):
    splits = load_folder(make_folder(*names))
    found = {}
    for split, rows in splits.items():
        feature = rows.features.get("label")
        found[split] = None if feature is None else [feature.names[label] for label in rows["label"]]
    assert found == expected
    count = sum(name.lower().endswith((".png", ".jpg", ".npy")) and not name.startswith((".", "_")) for name in names)
    hidden = sum("/." in name for name in names)
    assert sum(map(len, splits.values())) == count - hidden


def test_split_without_classes_is_left_out(make_folder, caplog):
    splits = load_folder(make_folder("train/a/1.png", "train/b/2.png", "test/3.png"))
    assert list(splits) == ["train"] and "'test'" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bus/1.png", "car/2.png", "overview.png"], "(bus, car), and 1 images beside them, such as overview.png"),
        (["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/x.png"], "such as test/x.png"),
        (["a/1.png", "b/2.png", "a/3.npy"], "holds pictures (2, such as a/1.png) and arrays (1, such as a/3.npy)"),
        (
            ["train/1.png", "val/2.png", "extra/3.png"],
            "holds train, val, which look like splits, but also extra",
        ),
        (["train/a/1.png", "train/b/2.png", "3.png"], "but also images"),
        (
            ["val/a/1.png", "val/b/2.png", "test/a/3.png"],
            "holds test, val, which look like splits, but none is for training",
        ),
        (["train_HR/1.png", "train_LR/2.png", "valid_HR/3.png"], "which look like splits, several of them train"),
    ],
)
def test_ambiguous_layout_is_one_line(make_folder, names, message):
    folder = make_folder(*names)
    with pytest.raises(UserError) as error:
        load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    assert message in str(error.value)


def test_without_labels_images_may_lie_anywhere(make_folder):
    folder = make_folder("bus/1.png", "car/2.png", "overview.png")
    images, _ = load_images(DataConfig(train_data_dir=str(folder), resolution=4, label_column="none"))
    assert len(images) == 2 and images.id2label is None


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_may_have_other_files_beside_them(make_folder, streaming):
    folder = make_folder("00000.parquet", "00000_stats.json", "00000.idx")
    for shard in range(2):
        write_shard(folder / f"{shard:05d}.tar", 4)
    splits = load_folder(folder, streaming=streaming)
    assert list(splits) == ["train"] and len(list(splits["train"])) == 8


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.tar", "train-1.tar", "val-0.tar"),
        ("birds-train-0.tar", "birds-train-1.tar", "birds-validation-0.tar"),
        ("data/train/0.tar", "data/train/1.tar", "data/valid/0.tar"),
    ],
)
def test_shards_say_their_split(tmp_path, names):
    for name in names:
        write_shard(tmp_path / name, 1)
    splits = load_folder(tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "validation": 1}


def test_pictures_come_before_the_archive_that_they_came_in(make_folder):
    folder = make_folder("a/1.png", "b/2.png", "images.tar")
    assert len(load_folder(folder)["train"]) == 2


def test_tables_of_metadata_say_the_labels(make_folder):
    folder = make_folder("pictures/test_1.png", "pictures/train_2.png")
    lines = ['{"file_name": "test_1.png", "kind": "a"}', '{"file_name": "train_2.png", "kind": "b"}']
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    images, validation = load_images(DataConfig(train_data_dir=str(folder), resolution=4, label_column="kind"))
    assert images.id2label == {0: "a", 1: "b"} and len(images) + len(validation) == 2


@pytest.mark.parametrize("header", ["file_name,label, label", "file_name,label,label", "file_name,file_name,label"])
def test_columns_of_one_name_are_said(make_folder, header):
    folder = make_folder("0.png", "1.png")
    (folder / "metadata.csv").write_text(f"{header}\n0.png,1,2\n1.png,2,1\n")
    name = max(header.replace(" ", "").split(","), key=header.count)
    with pytest.raises(UserError, match=f"metadata.csv cannot be read .it has several columns called '{name}'; remove"):
        load_images(DataConfig(train_data_dir=str(folder), resolution=4))


def test_names_with_backslashes_are_said(make_folder, caplog):
    folder = make_folder("a/0.png", "a/1.png")
    (folder / "metadata.csv").write_text("file_name,kind\na\\0.png,x\na\\1.png,y\n")
    load_folder(folder)
    assert "such as a\\0.png. Write / between folders, not \\" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.csv", "file_name, label\n0.png, a\n1.png, b\n2.png, a\n", {0: "a", 1: "b"}),
        ("metadata.csv", "file_name;label\n0.png;a, c\n1.png;b\n2.png;b\n", {0: "a, c", 1: "b"}),
        ("metadata.csv", "file_name\tlabel\n0.png\ta\n1.png\tb\n2.png\ta\n", {0: "a", 1: "b"}),
        ("metadata.csv", "file_name,Label\n0.png,a\n1.png,b\n2.png,a\n", "'Label', which holds Value('string'), is not used"),
        ("metadata.jsonl", "".join(f'{{"file_name": "{n}.png", "labels": ["a"]}}\n' for n in range(3)), "'labels', which holds List"),
    ],
)  # fmt: skip
def test_labels_of_a_table_are_used_or_said_to_be_not(make_folder, caplog, name, content, expected):
    folder = make_folder(*[f"{number}.png" for number in range(3)])
    (folder / name).write_text(content)
    images, _ = load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    if isinstance(expected, dict):
        assert images.id2label == expected and not caplog.text
    else:
        assert images.id2label is None and f"no classes: the column {expected}" in caplog.text


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("flags", [{}, {"condition_column": "mask"}])
def test_columns_of_text_of_a_parquet_table_are_text(make_folder, kind, flags):
    folder = make_folder("0.png", "1.png", "masks/0.png", "masks/1.png")
    columns = {"file_name": ["0.png", "1.png"], "mask": ["masks/0.png", "masks/1.png"]}
    pq.write_table(pa.table(columns, pa.schema(dict.fromkeys(columns, kind))), folder / "metadata.parquet")
    rows = load_folder(folder, **flags)["train"]
    assert len(rows) == 2 and isinstance(rows.features["mask"], datasets.Image) == bool(flags)


def test_zeros_before_a_class_are_kept_and_those_before_a_number_are_not(make_folder):
    folder = make_folder(*[f"{number}.png" for number in range(3)], "more/0.png")
    header, rows = "file_name, label,part,angle\n", ["0.png,007,007,007\n", "1.png,7,7,7\n", "2.png,,,\n"]
    (folder / "metadata.csv").write_text(header + "".join(rows))
    (folder / "more" / "metadata.csv").write_text(header + "0.png,10,10,10\n")
    for flags, texts in (({}, {"label"}), ({"name_columns": ["part"]}, {"part"})):
        found = load_folder(folder, **flags)["train"]
        for column in ("label", "part", "angle"):
            assert found[column] == (["007", "7", None, "10"] if column in texts else [7, 7, None, 10])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1e1", "2e1"], None),
        (["2020-01-01", "2020-01-02"], None),
        (["12:30:00", "13:00:00"], None),
        (["1.0", "1.1"], None),
        (["1.0", "2.0"], [1.0, 2.0]),
        (["-1", "10"], [-1, 10]),
        (["True", "false"], [True, False]),
    ],
)
def test_classes_and_captions_are_as_they_are_written(make_folder, values, expected):
    folder = make_folder("0.png", "1.png")
    rows = [f"{number}.png,{value},{value}\n" for number, value in enumerate(values)]
    (folder / "metadata.csv").write_text("file_name,label,text\n" + "".join(rows))
    found = load_folder(folder, caption_columns=["text"])["train"]
    assert found["label"] == (expected or values) and found["text"] == values
    (folder / "metadata.csv").rename(folder / "all.csv")
    found = load_tables(folder, [PurePosixPath("all.csv")], streaming=False, name_columns=["label"])["train"]
    assert found["label"] == (expected or values)


@pytest.mark.parametrize("is_packed", [False, True])
def test_named_images_are_left_out(make_folder, caplog, is_packed):
    caplog.set_level("INFO")
    folder = make_folder("a/1.png", "a/2.png", "b/1.png", "b/3.png")
    if is_packed:
        pack(
            folder / "all.zip", {f"{name}/{n}.png": picture(n) for name, n in (("a", 1), ("a", 2), ("b", 1), ("b", 3))}
        )
        for name in "ab":
            shutil.rmtree(folder / name)
    listed = folder.parent / "names.txt"
    config = DataConfig(train_data_dir=str(folder), resolution=4, validation_fraction=0.1, leave_out=str(listed))
    listed.write_text("a/2.png\n./b/1.png\nc.png\n")
    train, validation = load_images(config)
    assert len(train) + len(validation) == 2 and "left out: 2 images" in caplog.text
    assert "1 of 3 names in" in caplog.text and "are of no image, such as c.png" in caplog.text
    listed.write_text("1.png\n")
    with pytest.raises(UserError, match="names 1.png, which may be .*Write more of the path"):
        load_images(config)
    every = dataclasses.replace(config, leave_out=None)
    names = [images.name_of(index) for images in load_images(every) for index in range(len(images))]
    table = folder.parent / "copies.csv"  # as `preview` writes it
    table.write_text("copy,of\n" + "".join(f'"{name}",x\n' for name in names[:2]))
    train, validation = load_images(dataclasses.replace(config, leave_out=str(table), validation_split="train"))
    assert len(train) + len(validation) == 2


def test_column_of_splits_is_not_used_and_it_is_said(make_folder, caplog):
    folder = make_folder(*[f"{number}.png" for number in range(4)])
    rows = [f"{number}.png,{split}\n" for number, split in enumerate(("train", "train", "Test", "train"))]
    (folder / "metadata.csv").write_text("file_name,split\n" + "".join(rows))
    load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    assert "the column 'split', which holds Test, train, is not used" in caplog.text
    caplog.clear()
    load_images(DataConfig(train_data_dir=str(folder), resolution=4, label_column="split"))
    assert "is not used" not in caplog.text
    (folder / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,None\n2.png,cat\n3.png,None\n")
    load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    assert "a class is called 'None', as programs write a missing name" in caplog.text
    for missing in ("", "-1"):
        cells = ("cat", missing, "dog", "cat") if not missing else ("1", missing, "0", "1")
        rows = "".join(f"{number}.png,{cell}\n" for number, cell in enumerate(cells))
        (folder / "metadata.csv").write_text("file_name,label\n" + rows)
        config = {"train_data_dir": str(folder), "resolution": 4, "validation_fraction": 0.1}
        with pytest.raises(UserError, match="Leave the unlabelled rows out .`on_missing_label skip`."):
            load_images(DataConfig(**config))
        train, validation = load_images(DataConfig(**config, on_missing_label="skip"))
        assert len(train) + len(validation) == 3 and "left out: 1 of 4 images of the split 'train'" in caplog.text
        assert list(train.id2label.values()) == (["0", "1"] if missing else ["cat", "dog"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[{"file_name": "\u00e9.png", "label": "a"}, {"file_name": "B.png", "label": "b"}]', None),
        (
            '{"file_name": "e\u0301.png", "label": "a"}\n{"file_name": "b.png", "label": "b"}',
            "There is B.png: write capitals",
        ),
        ('{"file_name": "B.png",}\n', r"line 1 is no JSON: .*Each line must be one \{"),
        ('["B.png"]', "each row must be one {...} with the names of columns"),
        (None, "metadata.csv and metadata.jsonl in .* have rows for the same images, which count several times"),
    ],
)
def test_metadata_that_was_meant_otherwise_is_read_or_said(make_folder, caplog, table, message):
    folder = make_folder("\u00e9.png", "B.png")
    (folder / "metadata.jsonl").write_text(table or '{"file_name": "B.png", "label": "b"}\n')
    if table is None:
        (folder / "metadata.csv").write_text("file_name,label\nB.png,b\n")
    try:
        rows = load_folder(folder)["train"]
    except UserError as error:
        caplog.set_level(100)
        assert re.search(message, str(error))
    else:
        assert message is None or re.search(message, caplog.text)
        assert "a" in rows["label"] or table is None


def test_thumbnails_and_pointers_are_no_images(make_folder, caplog):
    folder = make_folder("0.png", "1.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/2.png")
    images, validation = load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    assert len(images) + len(validation) == 2 and not images.has_classes
    for path in folder.glob("*.png"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match="it is a Git LFS pointer: get the pictures by `git lfs pull`"):
        load_images(DataConfig(train_data_dir=str(folder), resolution=4))[0][0]


@pytest.mark.parametrize("place", ["", "sub/"])
def test_absolute_names_and_commas_in_other_headers_are_read(make_folder, place):
    folder = make_folder(f"{place}0.png", f"{place}1.png")
    rows = [f"{folder.absolute() / place}/{number}.png;{number} a, b;x{number}\n" for number in range(2)]
    (folder / place / "metadata.csv").write_text("file_name;caption, english;label\n" + "".join(rows))
    found = load_folder(folder)["train"]
    assert found["label"] == ["x0", "x1"] and found["caption, english"] == ["0 a, b", "1 a, b"]


def test_texts_of_json_that_look_like_dates_are_texts(make_folder):
    folder, date = make_folder("0.png", "1.png"), "2020-01-01"
    rows = [
        {"file_name": f"{n}.png", "label": date, "texts": [date], "more": {"date": date, "size": n}} for n in range(2)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_folder(folder)["train"]
    for name in ("label", "texts", "more"):
        assert found[name] == [row[name] for row in rows]


def test_table_without_further_columns_hides_no_other(make_folder, caplog):
    """A table that names files only comes first here: the test split has no labels."""
    folder = make_folder(*[f"{split}/{number}.png" for split in ("test", "train") for number in range(4)])
    (folder / "test" / "metadata.csv").write_text("file_name\n0.png\n1.png\ngone.png\n")
    assert set(load_folder(folder)["train"].features) == {"image"} and "such as test/gone.png" in caplog.text
    (folder / "train" / "metadata.csv").write_text("file_name,kind\n0.png,a\n1.png,b\n2.png,a\n")
    caplog.clear()
    splits = load_folder(folder)
    assert splits["train"]["kind"] == ["a", "b", "a", None] and splits["test"]["kind"] == [None] * 4
    assert "1 rows of metadata" in caplog.text and "3 of 8 images" in caplog.text and "test/2.png" in caplog.text


def test_column_of_lists_is_no_class():
    rows = datasets.Dataset.from_dict({"tags": [["a"], ["b", "c"]]})
    with pytest.raises(UserError, match="not one class for each image"):
        Classes.of(rows, rows, "tags")


def test_column_of_lists_of_pixels_is_pointed_to():
    rows = datasets.Dataset.from_dict({"pixels": [[[0, 1], [2, 3]]], "label": [0]})
    with pytest.raises(UserError, match=r"Lists of pixels are read if you name their column; .*'pixels'"):
        find_image_column(rows, None)
    assert find_image_column(rows, "pixels") == "pixels"


def test_columns_are_read_at_once_not_row_by_row(monkeypatch):
    rows = datasets.Dataset.from_dict({"a": [1, None, 3], "json": [{"b": "x"}, {"b": None}, {"b": "z"}]})
    monkeypatch.setattr(datasets.arrow_dataset.Column, "__iter__", None)
    chosen = rows.select([2, 0, 1])
    assert column_values(chosen, "a") == [3, 1, None] and column_values(chosen, "json.b") == ["z", "x", None]


def test_links_lead_to_images_once(make_folder, tmp_path):
    folder = make_folder("a/1.png", "b/2.png")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "3.png")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "d").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "round").symlink_to(folder)
    (folder / "a" / "zero.png").symlink_to("/dev/zero")
    rows = load_folder(folder)["train"]
    assert len(rows) == 3 and rows.features["label"].names == ["a", "b", "c"]
    (folder / "a" / "gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone.png cannot be decoded"):
        images, validation = load_images(DataConfig(train_data_dir=str(folder), resolution=4))
        for part in (images, validation):
            for number in range(len(part)):
                part[number]


def test_folder_that_cannot_be_read_is_named(make_folder, monkeypatch):
    folder, scandir = make_folder("cat/1.png", "dog/2.png", "owl/3.png", "lost+found/4.png"), os.scandir

    def refusing(path):
        if str(path).endswith(unreadable):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    unreadable = "lost+found"
    assert load_folder(folder)["train"].features["label"].names == ["cat", "dog", "owl"]
    unreadable = "dog"
    with pytest.raises(UserError, match="/dog cannot be read .Permission denied.*permissions"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("links", "classes"),
    [({"latest": "v2"}, ["v1", "v2"]), ({"v1/latest": "../v2"}, ["v1", "v2"]), ({"new": "../real", "old": "../real"}, ["new", "v1", "v2"])],
)  # fmt: skip
def test_links_to_folders_that_are_read_already_are_said(make_folder, caplog, links, classes):
    folder = make_folder("v1/1.png", "v2/2.png", "../real/3.png")
    for name, target in links.items():
        (folder / name).symlink_to(target)
    rows = load_folder(folder)["train"]
    assert rows.features["label"].names == classes and len(rows) == len(classes)
    assert f"1 {list(links)[-1].split('/')[-1]} (linked folders that are read already" in caplog.text


def test_captions_beside_classes_are_both_there(make_folder, caplog):
    folder = make_folder("apple/1.png", "apple/2.png", "pear/1.png", "pear/2.png")
    lines = [{"file_name": f"{name}/1.png", "text": f"a red {name}"} for name in ("apple", "pear", "plum")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = load_folder(folder)["train"]
    assert rows["text"] == ["a red apple", None, "a red pear", None]
    assert [rows.features["label"].names[label] for label in rows["label"]] == ["apple"] * 2 + ["pear"] * 2
    assert "2 of 4 images" in caplog.text and "1 rows of metadata" in caplog.text and "plum/1.png" in caplog.text
    train, validation = load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    assert len(train) + len(validation) == 4 and train.id2label == {0: "apple", 1: "pear"}


def test_labels_of_a_table_and_of_folders_are_ambiguous(make_folder):
    folder = make_folder("a/1.png", "a/2.png", "b/3.png", "b/4.png")
    lines = [f"{path.relative_to(folder)},{path.stem}" for path in sorted(folder.glob("*/*.png"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    with pytest.raises(UserError, match="several columns hold labels: .*`label_column`"):
        load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    train, _ = load_images(DataConfig(train_data_dir=str(folder), resolution=4, label_column="class_folder"))
    assert train.id2label == {0: "a", 1: "b"}


def test_foreign_table_is_named_and_does_not_matter_without_labels(make_folder, caplog):
    folder = make_folder("1.png", "2.png")
    (folder / "metadata.csv").write_text("id,price,price\n1,2,3\n")
    with pytest.raises(UserError, match="metadata.csv has no column `file_name` .*`label_column none`"):
        load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    train, validation = load_images(DataConfig(train_data_dir=str(folder), resolution=4, label_column="none"))
    assert len(train) + len(validation) == 2 and "metadata.csv" in caplog.text


def test_first_lines_say_what_is_there_and_what_was_left_out(make_folder, caplog):
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(6)]
    folder = make_folder(*names, "cat/7.heic", "cat/8.heic", "owl/1.heic", "owl/2.mov", "table.csv", "cat/.9.png")
    caplog.set_level("INFO")
    load_images(DataConfig(train_data_dir=str(folder), resolution=4, validation_fraction=0.1))
    assert "3 .heic (they need `pip install pillow-heif`)" in caplog.text
    assert "1 .mov (no images)" in caplog.text and "1 .png (hidden)" in caplog.text and "1 .csv" in caplog.text
    assert "no class 'owl'" in caplog.text
    assert f"11 training and 1 validation images (held out) from {folder}, split train, column image" in caplog.text
    assert "column label has 2 classes: cat " in caplog.text


def test_held_out_images_that_are_not_used_are_counted(make_folder, caplog):
    folder = make_folder(*[f"{number}.png" for number in range(10)])
    caplog.set_level("INFO")
    load_images(DataConfig(train_data_dir=str(folder), resolution=4, validation_fraction=0.4, max_validation_samples=1))
    assert "3 held-out images are not used" in caplog.text


def test_folder_without_images_says_what_it_holds(make_folder):
    with pytest.raises(UserError, match="holds no images: 1 .heic .*pip install.*, 1 .txt .*`.tar` and `.zip`"):
        load_images(DataConfig(train_data_dir=str(make_folder("a/1.heic", "a/notes.txt")), resolution=4))


def test_classes_that_are_numbers_are_sorted_by_number(make_folder, caplog):
    folder = make_folder(*[f"{name}/{number}.png" for name in (1, 2, 10) for number in range(2)])
    caplog.set_level("INFO")
    train, _ = load_images(DataConfig(train_data_dir=str(folder), resolution=4))
    assert train.id2label == {0: "1", 1: "2", 2: "10"}
    assert (
        "class 0 is called '1'; where a class is asked for, an integer is the number and a string the name"
        in caplog.text
    )


def test_folders_below_those_of_classes_are_said_if_they_are_alike(make_folder, caplog):
    caplog.set_level("INFO")
    load_folder(make_folder("batch0/images/1.png", "batch1/images/1.png", "batch0/8/1.png", "batch1/9/1.png"))
    assert "called alike" not in caplog.text
    load_folder(make_folder("batch0/6/1.png", "batch1/6/1.png"))
    assert "batch0, batch1 of" in caplog.text and "2 folders below them, such as 6, images, are called" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16 there")
def test_names_need_not_be_utf8(tmp_path):
    for name in (b"cat", b"d\xf6g"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for number in range(2):
            with open(os.path.join(folder, b"\xff%d.png" % number), "wb") as file:
                file.write(encoded(Image.new("RGB", (4, 4), (number, 0, 0))))
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=4))
    assert train.id2label == {0: "cat", 1: "d\ufffdg"}
    assert all(
        images[n]["pixel_values"].shape == (3, 4, 4) for images in (train, validation) for n in range(len(images))
    )
    assert train.fingerprint != validation.fingerprint


def pack(path, members: dict[str, bytes]):
    """Makes a .tar or .zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def picture(number: int, format: str = "png") -> bytes:
    return encoded(Image.new("RGB", (4, 4), (number, 0, 0)), format)


@pytest.mark.parametrize(
    ("archives", "expected"),
    [
        ({"all.tar": ["apple/1.png", "apple/2.png", "pear/1.png"]}, ["apple", "apple", "pear"]),
        ({"all.zip": ["x/apple/1.png", "x/pear/1.png", "x/__MACOSX/1.png"]}, ["apple", "pear"]),
        ({"apple.zip": ["1.png", "deep/2.png"], "pear.zip": ["1.png"]}, ["apple", "apple", "pear"]),
        ({"apple-0.tar": ["1.png"], "apple-1.tar": ["2.png"], "pear-0.tar": ["3.png"]}, ["apple", "apple", "pear"]),
        ({"data-0.zip": ["1.png"], "data-1.zip": ["2.png"]}, None),
        ({"0.tar": ["my.cat.1.png", "my.cat.2.png", "2024.05.png"]}, None),
    ],
)
def test_archives_are_folders(tmp_path, archives, expected):
    for number, (name, members) in enumerate(archives.items()):
        pack(tmp_path / name, {member: picture(10 * number + n) for n, member in enumerate(members)})
    rows = load_folder(tmp_path)["train"]
    label = rows.features.get("label")
    assert (None if label is None else [label.names[index] for index in rows["label"]]) == expected
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=4))
    values = [images[n]["pixel_values"][0, 0, 0] for images in (train, validation) for n in range(len(images))]
    assert len({round(float(value) * 127.5 + 127.5) for value in values}) == len(rows)
    assert train.fingerprint == load_images(DataConfig(train_data_dir=str(tmp_path), resolution=4))[0].fingerprint


def test_table_in_an_archive_describes_that_archive(tmp_path):
    for part in range(2):
        lines = "".join(f"{number}.png,{part}-{number}\n" for number in range(3))
        members = {f"{number}.png": picture(10 * part + number) for number in range(3)}
        pack(tmp_path / f"part-{part}.zip", members | {"metadata.csv": f"file_name,text\n{lines}".encode()})
    assert load_folder(tmp_path)["train"]["text"] == [f"{part}-{number}" for part in range(2) for number in range(3)]


def test_table_beside_archives_that_is_not_read_is_named(tmp_path, caplog):
    pack(tmp_path / "images.zip", {"1.png": picture(1), "2.png": picture(2)})
    (tmp_path / "train.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    load_folder(tmp_path)
    assert any("1 .csv (a table beside images is read as `metadata.csv`" in text for text in warnings_of(caplog))


def test_table_beside_archives_names_one_of_them(tmp_path):
    for part in range(2):
        pack(tmp_path / f"part-{part}.zip", {f"{name}.png": picture(part) for name in ("same", f"only{part}")})
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\nonly0.png,a\npart-1.zip/same.png,b\n")
    assert load_folder(tmp_path)["train"]["text"] == [None, "a", "b", None]
    table.write_text("file_name,text\nsame.png,a\n")
    with pytest.raises(UserError, match="metadata.csv names same.png, which several archives hold. Put a table into"):
        load_folder(tmp_path)


@pytest.mark.parametrize("is_twice", [False, True])
def test_splits_in_archives(tmp_path, is_twice):
    for split in ("train", "val"):
        inside = f"{split}/" if is_twice else ""
        pack(tmp_path / f"{split}.zip", {f"{inside}{name}/{split}.png": picture(1) for name in "ab"})
    splits = load_folder(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "validation": 2}
    assert splits["train"].features["label"].names == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_links_in_a_tar_are_the_files_they_lead_to(tmp_path, caplog, streaming):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        member, data = tarfile.TarInfo("./a/1.png"), picture(1)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        links = [("b/2.png", "a/1.png", tarfile.LNKTYPE), ("b/3.png", "2.png", tarfile.SYMTYPE)]
        links += [("b/4.png", "../../1.png", tarfile.SYMTYPE), ("5.png", "5.png", tarfile.SYMTYPE)]
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.linkname, member.type = target, kind
            tar.addfile(member)
    rows = list(load_folder(tmp_path, streaming=streaming, with_labels=False)["train"])
    assert [read_content(row["image"]) for row in rows] == [data] * 3
    assert "2 links in " in caplog.text and "such as b/4.png to ../../1.png" in caplog.text


def test_pictures_of_a_run_in_the_folder_are_not_trained_on(make_folder, caplog):
    folder = make_folder("cat/1.png", "dog/2.png", "runs/mine/.owner", "runs/mine/stage1/grid.png", ".owner")
    rows = load_folder(folder)["train"]
    assert rows.features["label"].names == ["cat", "dog"] and len(rows) == 2
    assert any("1 .png (in the output folder of a run" in text for text in warnings_of(caplog))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("lost", ["owl.zip", "owl"])
def test_classes_that_are_archives_or_dead_links_are_warned_of(make_folder, caplog, lost):
    folder = make_folder("cat/1.png", "dog/2.png")
    load_folder(folder)
    assert not warnings_of(caplog)
    if lost == "owl":
        (folder / lost).symlink_to("nowhere")
    else:
        pack(folder / lost, {"1.png": picture(3)})
    load_folder(folder)
    reason = "links that lead nowhere" if lost == "owl" else "archives beside folders of images"
    assert any(f"({reason}" in text for text in warnings_of(caplog))


@pytest.mark.parametrize("is_packed", [False, True])
def test_classes_that_are_not_seen_are_said(tmp_path, caplog, is_packed):
    pictures = {f"{name}/{number}.png": picture(number) for name in ("a", "b", ".net") for number in range(2)}
    pictures |= {"a/__old/1.png": picture(9), "__MACOSX/a/._1.png": b"no picture", ".git/index": b""}
    pack(tmp_path / "all.zip", pictures)
    if not is_packed:
        zipfile.ZipFile(tmp_path / "all.zip").extractall(tmp_path / "images")
    load_folder(tmp_path if is_packed else tmp_path / "images")
    assert "3 .png (in folders whose names begin with . or __, or of the system)" in caplog.text
    assert caplog.text.count("no class") == 1 and "no class '.net': none of its files" in caplog.text


def test_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="the archive .*a.zip cannot be read"):
        load_folder(tmp_path)


def damage_member(path, kind: str) -> None:
    """Damages one of a .zip's pictures: its checksum, its packed bytes, or its method (to Deflate64)."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("5.png").header_offset
    directory = data.rindex(b"5.png") - 46
    if kind == "checksum":
        data[directory + 16] ^= 255
    elif kind == "bytes":
        start = place + 30 + len("5.png")
        data[start : start + 8] = b"\xff" * 8
    else:
        data[place + 8] = data[directory + 10] = 9
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["checksum", "bytes", "method"])
def test_damaged_member_of_an_archive_is_a_bad_image(tmp_path, caplog, kind):
    pack(tmp_path / "a.zip", {f"{number}.png": picture(number) for number in range(10)})
    damage_member(tmp_path / "a.zip", kind)
    config = DataConfig(train_data_dir=str(tmp_path), resolution=4, max_bad_image_share=0.2)
    both = load_images(config)
    assert [each.fingerprint for each in both] == [each.fingerprint for each in load_images(config)]
    message = "the image 5.png of .*a.zip cannot be decoded .its archive is damaged or packed"
    with pytest.raises(UserError, match=message):
        [images[number] for images in both for number in range(len(images))]
    config.on_bad_image = "skip"
    train, validation = load_images(config)
    assert len(train) + len(validation) == 9 and train.fingerprint and "left out: the image 5.png of" in caplog.text
    assert "on_bad_image" not in caplog.text  # no advice that was followed


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["train_data_dir", "dataset_name"])
def test_webdataset_of_two_formats_with_dots_and_json(tmp_path, source, streaming):
    if source == "dataset_name":  # as on the Hub, with a card that says what the files are
        data_files = "[{split: train, path: '*.tar'}]"
        (tmp_path / "README.md").write_text(
            f"---\nconfigs:\n- {{config_name: default, data_files: {data_files}}}\n---\n"
        )
    for shard, format in enumerate(("png", "jpeg")):
        members = {}
        for number in range(4):
            name = f"photo.v{shard}.{number}"
            members[f"{name}.{'jpg' if shard else 'png'}"] = picture(50 * shard + 10 * number, format)
            members[f"{name}.json"] = json.dumps({"label": number % 2, "kind": "ab"[number % 2], "tags": [1]}).encode()
        pack(tmp_path / f"{shard}.tar", members)
    flags = {"label_column": "json.label", "num_classes": 2} if streaming else {"label_column": "json.kind"}
    train, validation = load_images(
        DataConfig(**{source: str(tmp_path)}, resolution=4, streaming=streaming, validation_fraction=0.25, **flags)
    )
    assert train.id2label == ({0: "0", 1: "1"} if streaming else {0: "a", 1: "b"})
    batches = [batch for images in (train, validation) for batch in make_pass_loader(images, batch_size=3)]
    assert sum(len(batch["pixel_values"]) for batch in batches) == 8
    for batch in batches:  # even tens have the first class
        values = (batch["pixel_values"][:, 0, 0, 0] * 127.5 + 127.5) / 10
        assert ((values.round() % 5).int() % 2 == batch["class_labels"]).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_sample_may_lie_anywhere_in_a_tar(tmp_path, streaming):
    """Some programs pack by type: all pictures, then all labels."""
    members = {f"{number}.cls": b"%d" % (number % 2) for number in range(0, 12, 3)}
    members |= {f"{number}.png": picture(number) for number in range(12)}
    members |= {f"{number}.cls": b"%d" % (number % 2) for number in range(12)}
    pack(tmp_path / "0.tar", members)
    classes = {"num_classes": 2} if streaming else {}
    config = DataConfig(train_data_dir=str(tmp_path), resolution=4, streaming=streaming, label_column="cls", **classes)
    batches = [batch for images in load_images(config) for batch in make_pass_loader(images, batch_size=3)]
    numbers = torch.cat([batch["pixel_values"][:, 0, 0, 0] * 127.5 + 127.5 for batch in batches]).round().int()
    assert sorted(numbers.tolist()) == list(range(12))
    assert torch.cat([batch["class_labels"] for batch in batches]).equal(numbers % 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_in_a_tar_without_a_picture_are_named(tmp_path, caplog, streaming):
    pictures = {f"images/{number}.png": picture(number) for number in range(4)}
    labels = {f"labels/{number}.cls": b"1" for number in range(4)} | {"metadata.csv": b"file_name\n"}
    pack(tmp_path / "0.tar", pictures | labels)
    load_folder(tmp_path, streaming=streaming, with_labels=False)
    assert "4 labels or texts" in caplog.text and "such as labels/0.cls of " in caplog.text
    assert streaming or "1 .csv (tables in a .tar are not read: pack images with a table as .zip)" in caplog.text


def test_samples_with_the_same_name_in_a_tar_stay_samples(tmp_path):
    """As after two archives were joined."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(6):
            for suffix, data in (("png", picture(number)), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"{number % 3}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert load_folder(tmp_path)["train"]["cls"] == list(range(6))


def test_empty_label_in_a_tar_is_none(tmp_path):
    members = {}
    for number in range(3):
        members |= {f"{number}.png": picture(number), f"{number}.cls": b"%d" % number if number else b" \n"}
    pack(tmp_path / "0.tar", members)
    assert load_folder(tmp_path)["train"]["cls"] == [None, 1, 2]


def test_value_unlike_the_first_ones_of_a_stream_is_empty_and_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(archives, "_INFERRED_SAMPLES", 3)
    values = [0, 1, 1, 1.0, "1", True, None, 0.9, "300b", 2**70, math.nan, "01"]
    members = {}
    for number, value in enumerate(values):
        members |= {f"{number}.png": picture(number), f"{number}.json": json.dumps({"n": value}).encode()}
    pack(tmp_path / "0.tar", members)
    assert [row["json.n"] for row in load_folder(tmp_path, streaming=True)["train"]] == [0, 1, 1, 1, 1, 1, *[None] * 6]
    assert caplog.text.count("cannot be read") == 1 and "the column json.n of 7 of " in caplog.text
    flags = {"label_column": "json.n", "num_classes": 2, "validation_fraction": 0.25}
    images, _ = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=4, streaming=True, **flags))
    with pytest.raises(UserError, match=r"the label of the image .*\d\.png.* is None"):
        list(make_pass_loader(images, batch_size=3))


def test_second_picture_of_a_sample_is_no_image_of_its_own(tmp_path):
    members = {}
    for number in range(4):
        members |= {f"{number}.jpg": picture(number, "jpeg"), f"{number}.seg.png": picture(9), f"{number}.cls": b"1"}
    pack(tmp_path / "0.tar", members)
    rows = load_folder(tmp_path)["train"]
    assert len(rows) == 4 and set(rows.features) == {"image", "seg.png", "cls"}
    pack(tmp_path / "0.tar", {f"{n}.{suffix}": picture(n, "png") for n in range(4) for suffix in ("jpg", "png")})
    with pytest.raises(UserError, match=r"several columns hold images: \['jpg', 'png'\]. .*`image_column`"):
        load_images(DataConfig(train_data_dir=str(tmp_path), resolution=4))


def test_stream_of_class_folders_is_refused_rather_than_trained_without_classes(tmp_path):
    pack(tmp_path / "0.tar", {"a/1.png": picture(1), "b/2.png": picture(2), "b/3.png": picture(3)})
    config = {"train_data_dir": str(tmp_path), "resolution": 4, "streaming": True}
    with pytest.raises(UserError, match="folders .a, b.*Leave `streaming` out"):
        load_images(DataConfig(**config))
    load_images(DataConfig(**config, label_column="none"))


@pytest.mark.parametrize(
    ("names", "number"),
    [
        (["images/{}.png", "masks/{}.png"], 4),
        (["train/photos/{}.jpg", "train/labels/{}.png", "val/photos/{}.jpg", "val/labels/{}.png"], 4),
        (["{}.jpg", "{}_mask.png"], 4),
        (["{}.jpg", "{}.seg.png", "{}-depth.png"], 8),
        (["images/{}.jpg", "masks/{}_mask.png"], 4),
        (["JPEGImages/{}.jpg", "SegmentationClass/{}.png"], 4),
        (["images/training/{}.jpg", "annotations/training/{}.png"], 4),
        (["images/cat/{}.jpg", "masks/dog/{}.png"], 0),
        (["cat/{}.jpg", "cat/masks/{}.png", "dog/{}.jpg", "dog/masks/{}.png"], 8),
        (["normal/{}.png", "pneumonia/{}.png"], 0),
        (["edges/{}.png", "corners/{}.png"], 0),
        (["cat/{}.png", "dog/{}.png"], 0),  # classes whose files are numbered
        (["labels/{}.png"], 0),  # there is nothing that they could be masks of
        (["{}_mask.png"], 0),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_masks_beside_images_are_named(tmp_path, caplog, names, number, is_packed):
    files = {name.format(n): encoded(Image.new("RGB", (8, 8), (n, len(name), 50))) for name in names for n in range(4)}
    if is_packed:
        pack(tmp_path / "all.zip", files)
    for name, data in () if is_packed else files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    load_images(DataConfig(train_data_dir=str(tmp_path), resolution=8, validation_fraction=0.01))
    found = re.findall(r"(\d+) of (\d+) images look like masks of others, such as (\S+) of (\S+),", caplog.text)
    assert len(found) == (number > 0)
    for count, of, mask, image in found:
        assert number - 1 <= int(count) <= number < int(of)  # one is held out
        assert re.search("mask|label|[Ss]eg|depth|annot", mask) and not re.search(
            "mask|label|seg|depth", Path(image).name
        )
