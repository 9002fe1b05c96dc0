"""Images become what the documentation says, in an order that is a pure function of (seed, position)."""

import zipfile

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from models import make_autoencoder
from pictures import encoded
from PIL import Image, PngImagePlugin, features

from dae_diffusers.data import (
    BalancedSampler,
    DataConfig,
    MicrobatchSampler,
    decode_image,
    load_images,
    make_pass_loader,
    make_training_loader,
    resize_and_crop,
)
from dae_diffusers.data.classes import Classes
from dae_diffusers.data.dataset import encoded_sizes, spread_over_classes
from dae_diffusers.data.formats import reads_heif
from dae_diffusers.data.images import ImageReader, read_content
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.cache import write_latent_cache
from dae_diffusers.latents.codes import CodeGrids


def test_digits_are_embedded():
    train, validation = load_images(DataConfig(dataset_name="digits", image_channels=1))
    assert (len(train), len(validation)) == (1500, 297)
    assert train.id2label == {n: str(n) for n in range(10)}
    item = train[0]
    assert item["pixel_values"].shape == (1, 32, 32)
    assert -1 <= item["pixel_values"].min() < -0.9 and 0.5 < item["pixel_values"].max() <= 1


def test_images_in_a_folder_are_known_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "faces").mkdir(parents=True)
    (tmp_path / "digits").mkdir()
    local = ({"train_data_dir": "data"}, {"dataset_name": "data/faces"}, {"dataset_name": str(tmp_path)})
    assert all(DataConfig(**each).is_local for each in local)
    assert not any(DataConfig(**each).is_local for each in ({}, {"dataset_name": "digits"}, {"dataset_name": "a/b"}))


def test_class_folders_give_labels_and_a_held_out_part(image_folder):
    config = DataConfig(train_data_dir=str(image_folder), resolution=16, validation_fraction=0.25)
    train, validation = load_images(config)
    assert (len(train), len(validation)) == (18, 6)
    assert train.id2label == validation.id2label == {0: "cat", 1: "dog"}
    names = {images.name_of(n) for images in (train, validation) for n in range(len(images))}
    assert len(names) == 24
    for number in range(len(train)):
        item = train[number]
        assert item["pixel_values"].shape == (3, 16, 16)
        assert train.id2label[item["class_labels"]] in train.name_of(number)


@pytest.mark.parametrize("count", [1, 3, 10, 25, 99])
@pytest.mark.parametrize("sizes", [(50,), (40, 30, 20), (90, 1, 2), (5,) * 13])
def test_images_to_show_are_spread_over_the_classes(sizes, count):
    labels = [3 * label for label, size in enumerate(sizes) for _ in range(size)]  # sorted, and some ids without images
    chosen = spread_over_classes(labels, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(labels)) and chosen == sorted(chosen)
    shares = [sum(labels[n] == 3 * label for n in chosen) for label in range(len(sizes))]
    assert all(share == size or share >= max(shares) - 1 for share, size in zip(shares, sizes, strict=True))
    mixed = np.random.default_rng(0).permutation(labels)
    assert [mixed[n] for n in spread_over_classes(mixed, count)] == [labels[n] for n in chosen]


def test_flat_folder_has_no_labels(tmp_path):
    for number in range(4):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
    train, _ = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=16))
    assert train.id2label is None and set(train[0]) == {"pixel_values"}


@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
def test_split_folders_without_classes_have_no_labels(held_out, tmp_path):
    for split in ("train", held_out):
        (tmp_path / split).mkdir()
        for number in range(2):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / split / f"{number}.png")
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=16))
    assert (len(train), len(validation)) == (2, 2)
    assert train.id2label is None and set(train[0]) == set(validation[0]) == {"pixel_values"}


def test_classes_may_be_called_like_splits(tmp_path):
    for folder in ("train/train", "train/validation", "validation/train", "validation/validation"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / folder / "0.png")
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=16))
    assert train.id2label == {0: "train", 1: "validation"}
    assert len({*train.labels}) == len({*validation.labels}) == 2


def test_white_is_one_and_black_is_minus_one():
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(Image.new("RGB", (8, 8), c)), "path": None} for c in ("white", "black")] * 2},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    )
    from dae_diffusers.data import ImageDataset

    images = ImageDataset(data, DataConfig(resolution=8), image_column="image")
    assert images[0]["pixel_values"].eq(1).all() and images[1]["pixel_values"].eq(-1).all()


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), {}, (255, 0, 0)),
        (Image.new("LA", (2, 2), (0, 128)), {}, (127, 127, 127)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), {"format": "tiff"}, (255, 0, 0)),
        (Image.new("L", (2, 2), 77), {}, (77, 77, 77)),
        (Image.new("1", (2, 2), 1), {}, (255, 255, 255)),
        (Image.new("RGB", (2, 2), (0, 255, 0)).convert("P"), {}, (0, 255, 0)),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), {}, (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 257 * 40, np.uint16)), {"format": "tiff"}, (40, 40, 40)),
    ],
    ids=["transparent", "opaque", "gray-alpha", "cmyk", "gray", "bilevel", "palette", "16-bit-png", "16-bit-tiff"],
)
def test_every_mode_is_converted_as_documented(image, options, expected):
    assert decode_image(encoded(image, **options)).getpixel((0, 0)) == expected


@pytest.mark.parametrize("format", ["jpeg", "png", "tiff", "webp", "mpo"])
def test_exif_rotation_is_applied_to_image_and_size(format):
    image, reader = Image.new("RGB", (8, 4)), ImageReader(DataConfig(dataset_name="digits"), "8-bit")
    for orientation in range(10):  # 5 to 8 turn by 90 degrees; 0 and 9 do not exist
        exif = image.getexif()
        exif[0x0112] = orientation
        data = encoded(image, format, exif=exif)
        expected = (4, 8) if 5 <= orientation <= 8 else (8, 4)
        assert decode_image(data).size == reader.size_of({"bytes": data, "path": None}, str)[::-1] == expected


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_png_with_megabytes_of_text_or_profile_is_read(kind):
    text = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        text.add_itxt("comment", "x" * 2_000_000, zip=True)
    elif kind != "iCCP":
        text.add_text("comment", "x" * 2_000_000, zip=kind == "zTXt")
    image = Image.new("RGB", (8, 4), (10, 20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    options = {"icc_profile": bytes(2_000_000)} if kind == "iCCP" else {"pnginfo": text}
    decoded = decode_image(encoded(image, exif=exif, **options))
    assert decoded.size == (4, 8) and decoded.getpixel((0, 0)) == (10, 20, 30)


def test_png_rotated_by_its_text_is_turned():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>', zip=True)
    assert decode_image(encoded(Image.new("RGB", (8, 4)), pnginfo=text)).size == (4, 8)


def test_heic_is_read_with_its_package_and_named_without_it():
    data = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"
    message = "cannot identify|no picture|HEIF|heif|Invalid" if reads_heif() else "needs `pip install .*heif"
    with pytest.raises(Exception, match=message):
        decode_image(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_lies_beside_others(tmp_path):
    for number, suffix in enumerate(("avif", "png", "jpg", "webp")):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / f"{number}.{suffix}")
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=16))
    assert len(train) + len(validation) == 4
    assert all(train[number]["pixel_values"].shape == (3, 16, 16) for number in range(3))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("suffix", "mode"), [("tif", "L"), ("tif", "F"), ("gif", "L")])
def test_pages_of_a_tiff_are_said_once(tmp_path, caplog, suffix, mode):
    for number in range(3):
        pages = [Image.new(mode, (4, 4), number + page) for page in range(3)]
        pages[0].save(tmp_path / f"{number}.{suffix}", save_all=True, append_images=pages[1:])
    load_images(DataConfig(train_data_dir=str(tmp_path), resolution=4, image_channels=1))
    assert caplog.text.count("has 3 pages. Only the first page of each file is used") == (suffix == "tif")


def test_float_images_are_refused():
    with pytest.raises(ValueError, match="float"):
        decode_image(encoded(Image.new("F", (2, 2)), "tiff"))


@pytest.mark.parametrize("size", [(64, 64), (200, 70), (33, 90), (16, 16), (9, 12)])
def test_crop_is_square_and_centred(size):
    # A horizontal ramp: the centre crop keeps the middle value in the middle.
    ramp = np.tile(np.linspace(0, 255, size[0]).astype(np.uint8), (size[1], 1))
    cropped = np.asarray(resize_and_crop(Image.fromarray(ramp), 16)).astype(float)
    assert cropped.shape == (16, 16)
    assert abs(cropped.mean() - 127.5) < 5


@pytest.mark.parametrize("fill", ["white", "black", "edge"])
@pytest.mark.parametrize("kind", ["picture", "array"])
def test_padded_images_are_whole_and_centred(kind, fill, tmp_path):
    low, high = (0, 255) if kind == "picture" else (-3.0, 5.0)
    for number, (height, width) in enumerate([(40, 20), (20, 40), (33, 33), (12, 60), (10, 6)]):
        ramp = np.linspace(low, high, height * width).reshape(height, width, 1).repeat(3, axis=2)
        if kind == "picture":
            Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / f"{number}.png")
        else:
            np.save(tmp_path / f"{number}.npy", ramp.astype(np.float32))
    flags = {"train_data_dir": str(tmp_path), "resolution": [16, 24], "pad": fill, "validation_fraction": 0.01}
    both = load_images(DataConfig(**flags, value_range=[] if kind == "picture" else [low, high]))
    for images in both:
        for n in range(len(images)):
            pixels = images[n]["pixel_values"]
            height, width = images.whole(n).shape[:2]
            inner = [max(1, round(side * min(16 / height, 24 / width))) for side in (height, width)]
            top, left = (16 - inner[0]) // 2, (24 - inner[1]) // 2
            middle = pixels[:, top : top + inner[0], left : left + inner[1]]
            assert middle[:, 0, 0].max() < -0.6 and middle[:, -1, -1].min() > 0.6  # both corners are there
            around = torch.ones(16, 24, dtype=torch.bool)
            around[top : top + inner[0], left : left + inner[1]] = False
            if fill == "edge" and around.any():
                assert torch.equal(pixels[:, 0, 0], middle[:, 0, 0])
            elif fill != "edge":
                assert (pixels[:, around] == (1 if fill == "white" else -1)).all()
    if kind == "array":  # the range is measured, and padded images are the same in memory and from files
        train = load_images(DataConfig(**flags))[0]
        assert train.value_range == [low, high] and len(train) > 1
        measured = torch.stack([train[n]["pixel_values"] for n in range(len(train))])
        assert torch.equal(measured, torch.stack([both[0][n]["pixel_values"] for n in range(len(train))]))
    with pytest.raises(ConfigError, match="`pad` keeps the whole image"):
        DataConfig(**flags, random_crop=True)


def test_pass_over_the_data_is_a_permutation_and_passes_differ():
    sampler = iter(MicrobatchSampler(10, 4, seed=0))
    stream = [index for _ in range(5) for index, _ in next(sampler)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]


def test_parts_of_data_sorted_by_class_hold_every_class(tmp_path):
    for split, number in (("train", 40), ("test", 20)):
        for level, name in enumerate("abcd"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for n in range(number):
                Image.new("RGB", (8, 8), (level * 60, n, 0)).save(folder / f"{n:02d}.png")
    config = DataConfig(train_data_dir=str(tmp_path), resolution=8, max_validation_samples=40, max_train_samples=80)
    train, validation = load_images(config)
    assert (len(train), len(validation)) == (80, 40)
    some = train.choose(40)
    for images, least in ((train, 10), (validation, 4), (some, 4)):
        assert torch.tensor(images.labels).bincount(minlength=4).min() >= least
        assert images.labels == sorted(images.labels)  # in their order
    assert all(
        (images[n]["pixel_values"][0] * 127.5 + 127.5).round().int().eq(images.labels[n] * 60).all()
        for n in range(40)
        for images in (some, validation)
    )
    assert train.choose(80) is train and train.choose(1000) is train
    assert torch.equal(some[7]["pixel_values"], load_images(config)[0].choose(40)[7]["pixel_values"])


def test_stream_starts_anywhere():
    whole = iter(MicrobatchSampler(10, 4, seed=3))
    expected = [next(whole) for _ in range(9)]
    late = iter(MicrobatchSampler(10, 4, seed=3, start=5))
    assert [next(late) for _ in range(4)] == expected[5:]


def test_processes_share_the_stream_without_overlap():
    def take(count, processes, index):
        shard = BatchSamplerShard(MicrobatchSampler(50, 4, seed=1), processes, index)
        return [batch for batch, _ in zip(shard, range(count), strict=False)]

    alone = take(6, 1, 0)
    first, second = take(3, 2, 0), take(3, 2, 1)
    assert alone == [batch for pair in zip(first, second, strict=True) for batch in pair]


LABELS = [0] * 30 + [5] * 4 + [2] * 7


def test_classes_come_equally_often_and_so_does_each_image_of_a_class():
    sampler = iter(BalancedSampler(LABELS, 8, seed=0))
    stream = [index for _ in range(3 * 30 * 4 // 8) for index, _ in next(sampler)]
    classes = [LABELS[index] for index in stream]
    assert all(set(classes[n : n + 3]) == {0, 2, 5} for n in range(0, len(classes), 3))
    assert (
        len({tuple(classes[n : n + 3]) for n in range(0, len(classes), 3)}) == 6
    )  # the order within a round is random
    of_class = {label: [index for index in stream if LABELS[index] == label] for label in (0, 2, 5)}
    assert sorted(of_class[0][:30]) == sorted(of_class[0][30:60]) == list(range(30)) != of_class[0][:30]
    assert sorted(of_class[5][:4]) == sorted(of_class[5][4:8]) == list(range(30, 34))
    assert of_class[0][:30] != of_class[0][30:60]


@pytest.mark.parametrize("start", [1, 6, 37])
def test_balanced_stream_starts_anywhere_and_is_shared_by_processes(start):
    def take(sampler, count):
        return [batch for batch, _ in zip(sampler, range(count), strict=False)]

    expected = take(BalancedSampler(LABELS, 5, seed=3), 50)
    assert take(BalancedSampler(LABELS, 5, seed=3, start=start), 10) == expected[start : start + 10]
    shares = [take(BatchSamplerShard(BalancedSampler(LABELS, 5, seed=3), 2, n), 25) for n in range(2)]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == expected


def test_rare_classes_come_as_often_from_images_latents_and_codes(image_folder, tmp_path):
    images, _ = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))
    images = images.select([number for number, label in enumerate(images.labels) if label or number % 4 == 0])
    assert max(images.labels.count(label) for label in (0, 1)) >= 2 * min(
        images.labels.count(label) for label in (0, 1)
    )
    latents = write_latent_cache(
        tmp_path / "cache", make_autoencoder("none").to_diffusers(), images, Accelerator(), batch_size=8, shard_size=5
    )
    codes = CodeGrids(torch.zeros(len(images), 1, 2, 2), torch.tensor(images.labels), images.id2label)
    assert latents.labels == codes.labels == images.labels and len(set(images.labels)) == 2
    orders = []
    for data in (images, latents, codes):
        loader = make_training_loader(data, batch_size=4, seed=0, balanced=True)
        batches = [batch["class_labels"] for batch, _ in zip(loader, range(10), strict=False)]
        assert torch.cat(batches).bincount().tolist() == [20, 20]
        orders.append(batches)
    assert all(torch.equal(a, b) for order in orders[1:] for a, b in zip(order, orders[0], strict=True))
    images.labels = None
    with pytest.raises(UserError, match="`balance_classes` needs images with classes"):
        make_training_loader(images, batch_size=4, seed=0, balanced=True)


def test_views_are_turned_and_flipped_by_bits_of_the_draw():
    flags = {"random_flip": True, "random_vertical_flip": True, "random_quarter_turn": True}
    images, _ = load_images(DataConfig(dataset_name="digits", image_channels=1, **flags))
    plain = images[0]["pixel_values"]
    views = [images[(0, draw)]["pixel_values"] for draw in range(16)]
    for draw, view in enumerate(views):
        expected = plain.flip(-1) if draw & 1 else plain
        expected = expected.flip(-2) if draw & 2 else expected
        assert torch.equal(view, torch.rot90(expected, draw >> 2, dims=(-2, -1)))
    assert len({view.numpy().tobytes() for view in views}) == 8  # all that a square has
    batch = images.__getitems__([(0, draw) for draw in range(16)])["pixel_values"]
    assert torch.equal(batch, torch.stack(views))
    with pytest.raises(ConfigError, match="`random_quarter_turn` turns squares only"):  # of an autoencoder
        DataConfig(dataset_name="digits", resolution=None, random_quarter_turn=True).settle((64, 32))


def test_augmentation_depends_on_the_draw_alone():
    config = DataConfig(dataset_name="digits", image_channels=1, random_flip=True, random_crop=True)
    train, _ = load_images(config)
    assert torch.equal(train[(0, 2)]["pixel_values"], train[(0, 2)]["pixel_values"])
    flipped, plain = train[(0, 1)]["pixel_values"], train[0]["pixel_values"]
    assert torch.equal(flipped.flip(-1), plain)  # square images leave a crop no choice


def test_workers_do_not_change_the_batches(image_folder):
    train, _ = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16, random_flip=True))
    batches = []
    for num_workers in (0, 2):
        loader = iter(make_training_loader(train, batch_size=5, seed=0, num_workers=num_workers))
        batches.append(torch.cat([next(loader)["pixel_values"] for _ in range(4)]))
        del loader
    assert torch.equal(*batches)


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_pass_loader_counts_each_image_once(image_folder, num_processes):
    train, _ = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))
    parts = [
        batch["pixel_values"]
        for process in range(num_processes)
        for batch in make_pass_loader(train, batch_size=4, process_index=process, num_processes=num_processes)
    ]
    seen = sorted(image.flatten().tolist() for image in torch.cat(parts))
    assert seen == sorted(train[n]["pixel_values"].flatten().tolist() for n in range(len(train)))


@pytest.fixture
def folder_with_bad_images(tmp_path):
    for number in range(20):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "03.png").write_bytes(b"")
    whole = (tmp_path / "07.png").read_bytes()
    (tmp_path / "07.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "11.png").write_bytes(b"not an image at all")
    return tmp_path


def test_bad_image_is_named(folder_with_bad_images):
    train, _ = load_images(DataConfig(train_data_dir=str(folder_with_bad_images), resolution=16))
    messages = []
    for number in range(len(train)):
        try:
            train[number]
        except UserError as error:
            messages.append(str(error))
    assert messages and all(any(name in text for name in ("03.png", "07.png", "11.png")) for text in messages)


def test_bad_images_are_skipped_and_named_up_to_a_share(folder_with_bad_images, caplog):
    config = DataConfig(
        train_data_dir=str(folder_with_bad_images), resolution=16, on_bad_image="skip", max_bad_image_share=1.0
    )
    train, validation = load_images(config)
    assert len(train) + len(validation) == 17
    assert all(train[n]["pixel_values"].shape == (3, 16, 16) for n in range(len(train)))
    assert all(name in caplog.text for name in ("03.png", "07.png", "11.png"))
    config.max_bad_image_share = 0.01
    with pytest.raises(UserError, match="max_bad_image_share"):
        load_images(config)


def test_small_images_are_enlarged_with_one_warning_or_refused(image_folder, caplog):
    config = DataConfig(train_data_dir=str(image_folder), resolution=128)
    train, _ = load_images(config)
    assert train[0]["pixel_values"].shape == train[1]["pixel_values"].shape == (3, 128, 128)
    assert caplog.text.count("enlarged") == 1
    config.strict_size = True
    with pytest.raises(UserError, match="strict_size"):
        load_images(config)[0][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_split": "trian"}, r"splits are \['train', 'test'\]"),
        ({"validation_split": "dev"}, r"splits are \['train', 'test'\]"),
        ({"image_column": "picture"}, r"columns are \['image', 'label'\]"),
        ({"image_column": "label"}, "not images"),
        ({"label_column": "class"}, r"columns \['image', 'label'\]"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(change, message):
    with pytest.raises(UserError, match=message):
        load_images(DataConfig(dataset_name="digits", image_channels=1, **change))


@pytest.mark.parametrize("labels", [[0, 1, -1, 2], [0, None, 1, 2]])
def test_unusable_labels_are_refused(labels, tmp_path):
    images = [{"bytes": encoded(Image.new("RGB", (8, 8))), "path": None}] * 4
    features = datasets.Features({"image": datasets.Image(), "y": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "y": labels}, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="label_column"):
        load_images(DataConfig(dataset_name=str(tmp_path), label_column="y", resolution=8))


def test_string_labels_become_sorted_classes(tmp_path):
    images = [{"bytes": encoded(Image.new("RGB", (8, 8))), "path": None}] * 4
    features = datasets.Features({"image": datasets.Image(), "y": datasets.Value("string")})
    rows = {"image": images, "y": ["b", "a", "b", "c"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    train, validation = load_images(DataConfig(dataset_name=str(tmp_path), label_column="y", resolution=8))
    assert train.id2label == {0: "a", 1: "b", 2: "c"}
    assert sorted([*train.labels, *validation.labels]) == [0, 1, 1, 2]


@pytest.mark.parametrize("is_declared", [False, True])
def test_spaces_and_accents_make_no_further_class(is_declared):
    names = [" cat", "ante\u0301", "ant\u00e9", "cat", "ant\u00e9 "]
    written = sorted(set(names))
    feature = datasets.ClassLabel(names=written) if is_declared else datasets.Value("string")
    values = list(map(written.index, names)) if is_declared else names
    rows = datasets.Dataset.from_dict({"y": values}, features=datasets.Features({"y": feature}))
    classes = Classes.of(rows, rows, "y")
    assert classes.id2label == {0: "cat", 1: "ant\u00e9"}
    assert classes.ids(rows, "train") == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("value", ["", " ", None])
def test_empty_text_is_no_class(value):
    rows = datasets.Dataset.from_dict({"y": ["a", value, "b"]})
    classes = Classes.of(rows, rows, "y")
    assert classes.id2label == {0: "a", 1: "b"}
    with pytest.raises(UserError, match="holds none in 1 of 3 rows of the split 'train'"):
        classes.ids(rows, "train")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load_images(DataConfig(train_data_dir=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    "change",
    [{"resolution": 0}, {"validation_fraction": 1.0}, {"max_train_samples": 0}, {"dataloader_num_workers": -1}],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        DataConfig(dataset_name="digits", **change)


def test_batch_larger_than_the_data_is_said(image_folder):
    train, _ = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))
    with pytest.warns(UserWarning, match="larger than the data set"):
        loader = make_training_loader(train, batch_size=64, seed=0)
    assert next(iter(loader))["pixel_values"].shape[0] == 64


def test_fingerprint_follows_the_content(image_folder):
    config = DataConfig(train_data_dir=str(image_folder), resolution=16)
    assert load_images(config)[0].fingerprint == load_images(config)[0].fingerprint
    fewer = DataConfig(train_data_dir=str(image_folder), resolution=16, validation_fraction=0.2)
    assert load_images(config)[0].fingerprint != load_images(fewer)[0].fingerprint


def test_fingerprint_follows_every_image(tmp_path):
    for split, count in (("train", 200), ("validation", 1)):
        (tmp_path / split).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / split / f"{number:03d}.png")
    config = DataConfig(train_data_dir=str(tmp_path), resolution=8)
    before = load_images(config)[0].fingerprint
    noise = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "002.png")  # none of those whose content is hashed
    assert load_images(config)[0].fingerprint != before


def test_sizes_of_encoded_images_are_read_from_files_and_from_tables(tmp_path):
    content = [encoded(Image.new("RGB", (8, 8 + number), (number, 0, 0))) for number in range(6)]
    (tmp_path / "2.png").write_bytes(content[2])
    items = [{"bytes": data, "path": None} for data in content]
    items[2] = {"bytes": None, "path": str(tmp_path / "2.png")}
    items[4] = {"bytes": None, "path": str(tmp_path / "missing.png")}
    rows = datasets.Dataset.from_dict({"image": items}).cast_column("image", datasets.Image(decode=False))
    sizes = [0 if number == 4 else len(data) for number, data in enumerate(content)]
    assert encoded_sizes(rows, "image").tolist() == sizes
    assert encoded_sizes(rows.select([5, 2, 4, 2]), "image").tolist() == [sizes[n] for n in (5, 2, 4, 2)]
    assert len(encoded_sizes(datasets.Dataset.from_dict({"image": [[1.0], [2.0]]}), "image")) == 0


def test_images_inside_an_archive_are_read_where_they_are(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"cat/{number}.png", encoded(Image.new("RGB", (8, 8), (number, 0, 0))))
    path = f"zip://cat/3.png::{tmp_path / 'images.zip'}"
    assert decode_image(read_content({"bytes": None, "path": path})).getpixel((0, 0)) == (3, 0, 0)


def test_labels_with_enormous_gaps_are_refused(tmp_path):
    rows = [{"image": {"bytes": encoded(Image.new("L", (8, 8))), "path": None}, "label": 10**12 * n} for n in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="without large gaps"):
        load_images(DataConfig(dataset_name=str(tmp_path), label_column="label", resolution=8, image_channels=1))


@pytest.mark.parametrize("is_array", [False, True])
def test_random_resized_crop_shows_squares_of_all_sizes_and_places(tmp_path, is_array):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None] * 4, (40, 64))
    (tmp_path / "images").mkdir()
    for number in range(2):
        if is_array:
            np.save(tmp_path / "images" / f"{number}.npy", ramp.astype(np.float32))
        else:
            Image.fromarray(ramp).save(tmp_path / "images" / f"{number}.png")
    config = DataConfig(
        train_data_dir=str(tmp_path / "images"), resolution=8, image_channels=1, random_resized_crop=0.25, value_range=[0, 255] if is_array else []
    )  # fmt: skip
    images = load_images(config)[0]
    rows = torch.stack([images[(0, draw)]["pixel_values"][0, 4] for draw in range(100)])
    widths = (rows[:, -1] - rows[:, 0]) * 127.5 / 4 * 8 / 7  # in pixels of the file
    assert 15 < widths.min() < 25 and 35 < widths.max() < 45
    assert rows[:, 0].std() > 0.1
    assert torch.equal(images[(0, 5)]["pixel_values"], images[(0, 5)]["pixel_values"])
    assert torch.equal(images[0]["pixel_values"], images[0]["pixel_values"])  # the centre crop, without a draw


def test_crops_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude each other"):
        DataConfig(dataset_name="digits", random_crop=True, random_resized_crop=0.5)
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        DataConfig(dataset_name="digits", random_resized_crop=0.0)
