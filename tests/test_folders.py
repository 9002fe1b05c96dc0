"""What the layout of a folder says of splits and classes."""

import io
import tarfile

import datasets
import numpy as np
import pytest
from pictures import encoded
from PIL import Image

from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.data.columns import label_names
from dae_diffusers.data.folders import load_folder
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
            "holds train, val, which look like splits, and beside them extra",
        ),
        (["train/a/1.png", "train/b/2.png", "3.png"], "and beside them images"),
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


def test_column_of_lists_is_no_class():
    rows = datasets.Dataset.from_dict({"tags": [["a"], ["b", "c"]]})
    with pytest.raises(UserError, match="not one class for each image"):
        label_names(rows, rows, "tags")


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
