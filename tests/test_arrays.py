"""Images that are no 8-bit pictures go through every script, and come back in their own values."""

import io
import json
import re
import resource
import struct
import threading
import warnings
import zlib
from functools import partial

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from pictures import encoded
from PIL import Image, TiffImagePlugin
from scripts import TINY_DAE, TINY_DIT, run

from dae_diffusers import DAEDiTPipeline, repository_files
from dae_diffusers.data import DataConfig, decode_image, load_images, make_pass_loader, resize_and_crop
from dae_diffusers.data.arrays import (
    LossyDepthError,
    decode_array,
    find_depth,
    read_value_range,
    resize_and_crop_array,
    save_value_range,
)
from dae_diffusers.data.ranges import ValueSurvey
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.metrics.features import prepare_images
from dae_diffusers.randomness import derived_seed
from dae_diffusers.training import train_dae, train_dit
from dae_diffusers.vision import as_rgb

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")


@pytest.fixture
def tiff_folder(tmp_path):
    """16-bit images with one channel, of two classes."""
    random = np.random.default_rng(0)
    for name in ("cold", "hot"):
        (tmp_path / "tiff" / name).mkdir(parents=True)
        for number in range(6):
            values = random.integers(1000, 60000, (20, 24), dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / "tiff" / name / f"{number}.tiff")
    return tmp_path / "tiff"


@pytest.fixture
def npy_folder(tmp_path):
    """Float images with 12 channels, channels first."""
    random = np.random.default_rng(0)
    (tmp_path / "npy").mkdir()
    for number in range(10):
        np.save(tmp_path / "npy" / f"{number}.npy", random.normal(5, 2, (12, 16, 16)).astype(np.float32))
    return tmp_path / "npy"


@pytest.mark.parametrize("kind", ["tiff", "npy"])
def test_from_files_to_samples_in_the_original_values(kind, tiff_folder, npy_folder, tmp_path):
    folder, channels = (tiff_folder, 1) if kind == "tiff" else (npy_folder, 12)
    flags = f" --image_channels {channels}"
    output = tmp_path / "run"
    run(train_dae, TINY_DAE + flags, train_data_dir=folder, output_dir=output)
    run(train_dit, TINY_DIT + flags, train_data_dir=folder, output_dir=output, vae=output / "vae")
    low, high = read_value_range(str(output / "vae"))
    if kind == "tiff":
        assert (low, high) == (0, 65535)
    else:
        values = [np.load(path) for path in folder.glob("*.npy")]
        assert min(map(np.min, values)) <= low < high <= max(map(np.max, values))
    pipeline = DAEDiTPipeline.from_pretrained(output / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    labels = {"class_labels": ["hot", "cold"]} if kind == "tiff" else {"num_images_per_label": 2}
    generator = torch.Generator().manual_seed(0)
    images = pipeline(**labels, num_inference_steps=2, output_type="np", generator=generator).images
    generator = torch.Generator().manual_seed(0)
    unit = pipeline(**labels, num_inference_steps=2, output_type="pt", generator=generator).images
    assert images.shape == (2, 16, 16, channels)
    np.testing.assert_allclose(images, unit.permute(0, 2, 3, 1).numpy() * (high - low) + low, rtol=1e-5)
    assert json.loads((output / "pipeline" / "model_index.json").read_text())["value_range"] == [low, high]
    for folder in ("pipeline", "pipeline/vae"):  # what a generator on its autoencoder asks for
        assert read_value_range(str(output / folder)) == [low, high]


@pytest.mark.parametrize("start", ["--pretrained_model_name_or_path {run}/vae", "--stage1_dir {run}", "left"])
def test_training_on_keeps_the_range_of_the_autoencoder(start, npy_folder, tmp_path):
    """The frozen encoder must see other images in the scale of those that it was trained on."""
    flags = TINY_DAE + " --image_channels 12"
    place = "vae"
    if start == "left":  # a stage 1 beside the `vae/` of an earlier run
        place, flags, start = "stage1", f"{flags} --stage 1", "--stage1_dir {run}"
        (tmp_path / "run" / "vae").mkdir(parents=True)
        (tmp_path / "run" / "vae" / "config.json").write_text("{}")
        save_value_range([0.0, 1.0], tmp_path / "run" / "vae")
    run(train_dae, flags, train_data_dir=npy_folder, output_dir=tmp_path / "run")
    value_range = read_value_range(str(tmp_path / "run" / place))
    (tmp_path / "halved").mkdir()
    for path in npy_folder.glob("*.npy"):
        np.save(tmp_path / "halved" / path.name, np.load(path) / 2)
    flags = f"{TINY_DAE} --image_channels 12 --stage 2 {start.format(run=tmp_path / 'run')}"
    run(train_dae, flags, train_data_dir=tmp_path / "halved", output_dir=tmp_path / "more")
    assert read_value_range(str(tmp_path / "more" / "vae")) == value_range is not None


def test_sixteen_bits_are_kept(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) + 30000
    for number in range(2):
        Image.fromarray(values).save(tmp_path / f"{number}.tiff")
    config = DataConfig(train_data_dir=str(tmp_path), resolution=8, image_channels=1, value_range=[30000.0, 30063.0])
    train, _ = load_images(config)
    expected = torch.linspace(-1, 1, 64).view(1, 8, 8)
    torch.testing.assert_close(train[0]["pixel_values"], expected, atol=1e-6, rtol=0)


def test_both_splits_are_read_the_same_way(tmp_path):
    """A 16-bit file among the validation images of an 8-bit data set is converted as it would be among the others."""
    for split, values in (("train", np.full((8, 8), 100, np.uint8)), ("test", np.full((8, 8), 100 * 257, np.uint16))):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / split / "a" / "0.png")
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=8, image_channels=1))
    assert torch.equal(train[0]["pixel_values"], validation[0]["pixel_values"])


def save_pictures(folder, *pictures):
    """`train/a/0.png`, `train/a/1.png`, ..., the last one in `test/a`."""
    for number, picture in enumerate(pictures):
        path = folder / ("train" if number < len(pictures) - 1 else "test") / "a" / f"{number}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return {"train_data_dir": str(folder), "resolution": 8, "image_channels": 1}


@pytest.mark.parametrize("on_bad_image", ["raise", "skip"])
def test_white_is_white_in_8_bit_pictures_among_16_bit_ones(on_bad_image, tmp_path):
    gray = np.full((8, 8), 200, np.uint8)
    flags = save_pictures(tmp_path, gray.astype(np.uint16) * 257, gray, np.stack([gray] * 3, axis=-1))
    config = DataConfig(**flags, on_bad_image=on_bad_image)
    train, validation = load_images(config)
    assert train.value_range == [0, 65535]
    for item in (*(train[n] for n in range(2)), validation[0]):
        expected = torch.full((1, 8, 8), 200 / 255 * 2 - 1)
        torch.testing.assert_close(item["pixel_values"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("first", "value_range", "seen"),
    [(np.uint16, [1000.0, 3000.0], "8-bit"), (np.float32, [], "8-bit"), (np.uint8, [0.0, 255.0], "16-bit")],
)
def test_pictures_of_another_depth_are_refused_where_their_scale_is_unknown(first, value_range, seen, tmp_path):
    gradient = np.arange(64).reshape(8, 8)
    other = np.uint8 if seen == "8-bit" else np.uint16
    flags = save_pictures(tmp_path, gradient.astype(first), gradient.astype(other), gradient.astype(first))
    with pytest.raises(UserError, match=f"1.tiff cannot be decoded .it holds {seen} pixels, unlike the first image"):
        load_images(DataConfig(**flags, value_range=value_range))[0][1]


def test_a_part_of_the_images_is_read_like_the_whole(tmp_path):
    gray = np.full((8, 8), 100, np.uint8)
    train, _ = load_images(DataConfig(**save_pictures(tmp_path, gray, *[gray.astype(np.uint16) * 257] * 6)))
    part = train.choose(2)
    assert not train.is_array and part.depth == train.depth == "8-bit"
    assert all(torch.equal(part[n]["pixel_values"], train[0]["pixel_values"]) for n in range(2))


def test_the_range_is_found_wherever_the_autoencoder_is(tmp_path, monkeypatch, caplog):
    assert read_value_range(str(tmp_path)) is None and read_value_range(None) is None
    for place in ("vae", "stage1"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
        save_value_range([1.0, 2.0], tmp_path / place)
    save_value_range(None, tmp_path / "vae")  # another run, of 8-bit pictures: the range of before goes
    assert read_value_range(str(tmp_path / "vae")) is read_value_range(str(tmp_path)) is None
    save_value_range([-5.0, 7.0], tmp_path / "vae")
    assert read_value_range(str(tmp_path / "vae")) == read_value_range(str(tmp_path)) == [-5, 7]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--user--model"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (tmp_path / "vae").rename(repository / "snapshots" / ("0" * 40))
    assert read_value_range("user/model") == [-5, 7]
    assert read_value_range("user/other") is None and read_value_range("no/such/folder") is None  # offline too
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    tried = []

    def not_reached(repository, name):
        tried.append(name)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(repository_files, "hf_hub_download", not_reached)
    assert not caplog.messages and read_value_range("user/other") is None
    assert len(tried) == len(caplog.messages) == 1 and "what user/other says of its images" in caplog.text
    assert read_value_range("user/model") == [-5, 7]  # from the cache


def test_array_columns_of_a_dataset(tmp_path):
    features = datasets.Features({"field": datasets.Array3D((8, 8, 2), "float32"), "kind": datasets.Value("string")})
    rows = {"field": [np.full((8, 8, 2), n, np.float32) for n in range(6)], "kind": ["a", "b"] * 3}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(dataset_name=str(tmp_path), resolution=8, image_channels=2, label_column="kind")
    train, validation = load_images(config)
    assert train[0]["pixel_values"].shape == (2, 8, 8) and train.id2label == {0: "a", 1: "b"}
    (held_out,) = (n for n in range(6) if n not in {row[0][0][0] for row in train.rows["field"]})
    low, high = min({*range(6)} - {held_out}), max({*range(6)} - {held_out})
    assert train.value_range == [low, high]
    means = [(float(item["pixel_values"].mean()) + 1) / 2 * (high - low) + low for item in train]
    assert sorted(means) == pytest.approx(sorted({*range(6)} - {held_out}))
    assert len(train) + len(validation) == 6


def test_arrays_are_resized_as_pictures_are():
    """Against Pillow, which halves first and rounds after each step."""
    picture = Image.fromarray((np.add.outer(np.arange(70) * 2, np.arange(90)) % 256).astype(np.uint8))
    picture = picture.resize((70, 90))
    expected = np.asarray(resize_and_crop(picture, 16)).astype(float)
    found = resize_and_crop_array(np.asarray(picture, dtype=np.float32)[..., None], 16)[..., 0]
    assert np.abs(found - expected).max() < 8 and np.abs(found - expected).mean() < 4


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (1, 6, 5)])
def test_channels_may_come_first_or_last(shape):
    assert decode_array(np.zeros(shape), channels=1).shape == (6, 5, 1)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 4, 3)), "shape"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.array([["a", "b"]]), "not numbers"),
        (np.zeros((0, 4)), "shape"),
        (np.array([[{}]], dtype=object), "pickle|not numbers"),
    ],
)
def test_bad_arrays_are_refused(array, sentence, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=f"(?i){sentence}"):
        decode_array((tmp_path / "a.npy").read_bytes(), channels=1)


def test_a_damaged_file_is_named(npy_folder):
    paths = sorted(npy_folder.glob("*.npy"))
    for path in paths[2:]:
        path.write_bytes(path.read_bytes()[:200])
    config = DataConfig(train_data_dir=str(npy_folder), resolution=16, image_channels=12)
    with pytest.raises(UserError, match=r"\d.npy cannot be decoded"):
        load_images(config)


@pytest.mark.parametrize("value_range", [[1.0], [2.0, 1.0], [0.0, 0.0]])
def test_bad_ranges_are_refused(value_range):
    with pytest.raises(ConfigError, match="value_range"):
        DataConfig(dataset_name="digits", value_range=value_range)


def tiff_of(array: np.ndarray, *, white_is_zero: bool = False) -> bytes:
    """An uncompressed one; Pillow writes fewer kinds than it reads."""
    height, width = array.shape[:2]
    bits, number_type = 8 * array.dtype.itemsize, {"u": 1, "i": 2}[array.dtype.kind]
    channels = 1 if array.ndim == 2 else array.shape[2]
    tags = {
        256: width,
        257: height,
        259: 1,
        262: int(not white_is_zero) if array.ndim == 2 else 2,
        277: channels,
        278: height,
        273: 0,
    }
    tags |= {279: array.nbytes, 258: (bits,) * channels, 339: (number_type,) * channels}
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)  # adds its own size to 273, where the pixels begin
    return file.getvalue() + array.tobytes()


def png_of(array: np.ndarray) -> bytes:
    """Of 3 or 4 channels of 16 bits; Pillow writes none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def parquet_of(folder, *items):
    """Images in their order, the last one for validation; each bytes of a file, or None."""
    for split, part in (("train", items[:-1]), ("test", items[-1:])):
        rows = datasets.Dataset.from_dict({"image": [{"bytes": item, "path": None} for item in part]})
        rows.cast_column("image", datasets.Image(decode=False)).to_parquet(folder / f"{split}.parquet")
    return {"dataset_name": str(folder), "resolution": 8, "image_channels": 1, "max_bad_image_share": 1.0}


def npy_of(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.int16, -30000, 30000), (np.int32, -(2**30), 2**30), (np.uint32, 0, 2**32 - 2**8)],
)
def test_signed_and_wide_integers_keep_their_values(dtype, low, high, tmp_path):
    values = np.linspace(low, high, 64).astype(dtype).reshape(8, 8)
    flags = parquet_of(tmp_path, *[tiff_of(values)] * 2)
    config = DataConfig(**flags)
    train, _ = load_images(config)
    assert train.depth == "numbers" and train.value_range == [low, high]
    torch.testing.assert_close(train[0]["pixel_values"], torch.linspace(-1, 1, 64).view(1, 8, 8), atol=1e-4, rtol=0)


def test_sixteen_bits_are_told_from_other_integers():
    gray = np.full((8, 8), 300)
    graymap = b"P5 8 8 65535\n" + gray.astype(">u2").tobytes()
    for content in (tiff_of(gray.astype(np.uint16)), encoded(Image.fromarray(gray.astype(np.uint16))), graymap):
        assert find_depth(content) == "16-bit"
        assert (decode_array(content, channels=1) == 300).all()
    for dtype in (np.int16, np.int32, np.uint32):
        assert find_depth(tiff_of(gray.astype(dtype))) == "numbers"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_white_in_a_tiff_whose_white_is_0(dtype):
    ramp, white = np.arange(64, dtype=dtype).reshape(8, 8), np.iinfo(dtype).max
    ramp *= white // 63
    negative = tiff_of(white - ramp, white_is_zero=True)
    np.testing.assert_array_equal(decode_image(negative, channels=1), decode_image(tiff_of(ramp), channels=1))
    np.testing.assert_array_equal(decode_array(negative, channels=1)[..., 0], ramp)


def test_integers_of_unknown_scale_are_refused_among_8_bit_pictures(tmp_path):
    gray = Image.new("L", (8, 8), 100)
    flags = parquet_of(tmp_path, encoded(gray), tiff_of(np.full((8, 8), -5, np.int16)), encoded(gray))
    with pytest.raises(UserError, match="float, signed or 32-bit pixels, unlike the first image"):
        load_images(DataConfig(**flags))[0][1]


@pytest.mark.parametrize("scale", [1, 257])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_converted_in_any_range_as_they_are_without_one(channels, scale, tmp_path):
    """Palettes, transparency and EXIF rotation."""
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    exif = ramp.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    white = encoded(Image.new("LA", (8, 8), (0, 0)))
    palette = Image.merge("RGB", [ramp.point(lambda x: 255 - x)] * 3).quantize(64)
    pictures = [white, encoded(palette), encoded(ramp, exif=exif), encoded(ramp.convert("1")), encoded(ramp)]
    flags = parquet_of(tmp_path, *pictures) | {"image_channels": channels}
    plain, _ = load_images(DataConfig(**flags))
    arrays, _ = load_images(DataConfig(**flags, value_range=[0, 255 * scale]))
    assert arrays.is_array and not plain.is_array
    for number in range(4):
        torch.testing.assert_close(arrays[number]["pixel_values"], plain[number]["pixel_values"], atol=1e-6, rtol=0)


def test_exif_rotation_is_applied_to_arrays():
    image = Image.fromarray(np.arange(32, dtype=np.uint16).reshape(4, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    expected = np.rot90(np.asarray(image), -1)[..., None]
    for format in ("png", "tiff"):
        np.testing.assert_array_equal(decode_array(encoded(image, format, exif=exif), channels=1), expected)


@pytest.mark.parametrize("rest", ["good", "too deep"])
def test_errors_name_the_row_in_the_file_not_that_of_the_shuffled_part(rest, tmp_path):
    items = [png_of(np.full((8, 8, 3), 300, np.uint16)) if rest == "too deep" else encoded(Image.new("L", (8, 8)))] * 12
    items[7] = b"no picture" if rest == "good" else items[7]
    rows = datasets.Dataset.from_dict({"image": [{"bytes": item, "path": None} for item in items]})
    rows.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(dataset_name=str(tmp_path), resolution=8, image_channels=1, validation_fraction=0.1)
    first = np.random.default_rng(derived_seed(0, 2)).permutation(12)[1]
    row = 7 if rest == "good" else first
    with pytest.raises(UserError, match=f"the image row {row} of the dataset cannot be"):
        for part in load_images(config):
            part.__getitems__(list(range(len(part))))


@pytest.mark.parametrize("content", ["png", "tiff", "pixmap", "png, 4 channels"])
@pytest.mark.parametrize("value_range", [[], [0.0, 65535.0], [0.0, 255.0]])
def test_sixteen_bits_in_each_of_several_channels_are_not_cut_silently(content, value_range, tmp_path):
    values = np.full((8, 8, 4 if "4" in content else 3), 300, np.uint16)
    values[..., 3:] = 65535  # opaque
    pixmap = b"P6 8 8 65535\n" + values.astype(">u2").tobytes()
    content = {"tiff": tiff_of, "pixmap": lambda _: pixmap}.get(content, png_of)(values)
    gray = encoded(Image.new("L", (8, 8), 100))
    (tmp_path / "first").mkdir()
    flags = parquet_of(tmp_path / "first", content, gray, gray)
    with pytest.raises(
        UserError, match=r"row 0 of the dataset .*more than 8 bits in each .* `.npy`, \(H, W, channels\)"
    ):
        load_images(DataConfig(**flags, value_range=value_range))
    (tmp_path / "second").mkdir()
    flags = parquet_of(tmp_path / "second", gray, content, gray)
    train, _ = load_images(DataConfig(**flags, value_range=value_range))
    if value_range:
        with pytest.raises(UserError, match="row 1 of the dataset .*more than 8 bits in each"):
            train[1]
    else:  # 8 bits are what the others have
        torch.testing.assert_close(train[1]["pixel_values"], torch.full((1, 8, 8), 1 / 127.5 - 1), atol=0.01, rtol=0)


@pytest.mark.parametrize("crop", [{"random_crop": True}, {"random_resized_crop": 0.5}, {}])
def test_the_range_is_that_of_what_random_crops_may_show(crop, tmp_path):
    values = np.full((8, 24), 5, np.float32)
    values[:, 8:16] += np.arange(8) / 8
    values[0, 0], values[-1, -1] = -100, 100
    config = DataConfig(**parquet_of(tmp_path, *[npy_of(values)] * 2), **crop)
    train, _ = load_images(config)
    assert train.value_range == ([-100, 100] if crop else [5, 5.875])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_first_image_does_not_decide_how_the_others_are_read(streaming, tmp_path):
    good = npy_of(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    flags = parquet_of(tmp_path, b"damaged", None, *[good] * 4) | {"on_bad_image": "skip", "streaming": streaming}
    train, validation = load_images(DataConfig(**flags, value_range=[0, 1] if streaming else []))
    assert train.is_array and validation.is_array and validation.depth == "numbers"
    if not streaming:
        assert len(train) == 3 and train.depth == "numbers"
        torch.testing.assert_close(train[0]["pixel_values"].flatten(), torch.linspace(-1, 1, 64))


def test_nothing_but_bad_images_is_said(tmp_path):
    flags = parquet_of(tmp_path, b"damaged", b"damaged", npy_of(np.eye(8)))
    with pytest.raises(UserError, match="all 2 images are bad; the first: the image row 0 of the dataset"):
        load_images(DataConfig(**flags, on_bad_image="skip"))


def test_threads_leave_the_filters_of_warnings_alone(tmp_path, monkeypatch):
    threads, enter = set(), warnings.catch_warnings.__enter__

    def recorded(self):
        threads.add(threading.current_thread())
        return enter(self)

    monkeypatch.setattr(warnings.catch_warnings, "__enter__", recorded)
    pictures = [encoded(Image.new("L", (8, 8), n)) for n in range(40)]
    for value_range in ([], [0.0, 65535.0]):
        images, _ = load_images(
            DataConfig(**parquet_of(tmp_path, *pictures), on_bad_image="skip", value_range=value_range)
        )
        assert len(images) == 39
    assert threads == {threading.main_thread()}


def test_an_image_without_bytes_and_path_is_a_bad_one(tmp_path):
    picture = encoded(Image.new("L", (8, 8)))
    flags = parquet_of(tmp_path, None, picture, picture)
    train, _ = load_images(DataConfig(**flags))
    assert train.fingerprint == load_images(DataConfig(**flags))[0].fingerprint
    with pytest.raises(UserError, match="row 0 of the dataset cannot be decoded .the row is empty"):
        train[0]
    assert len(load_images(DataConfig(**flags, on_bad_image="skip"))[0]) == 1


def test_an_image_without_bytes_and_path_is_a_bad_one_of_a_stream(tmp_path):
    pictures = [encoded(Image.new("L", (8, 8), value)) for value in (0, 100, 200)]
    flags = parquet_of(tmp_path, pictures[0], None, *pictures[1:], None) | {"streaming": True}
    train, validation = load_images(DataConfig(**flags))
    assert train.fingerprint == load_images(DataConfig(**flags))[0].fingerprint
    with pytest.raises(UserError, match="row 0 of the dataset cannot be decoded .the row is empty"):
        validation[0]
    with pytest.raises(UserError, match=r"number \d of the stream cannot be decoded .the row is empty"):
        list(make_pass_loader(train, batch_size=3))
    train, _ = load_images(
        DataConfig(**flags | {"validation_split": "train"}, on_bad_image="skip")
    )  # the first is held out
    assert [len(batch["pixel_values"]) for batch in make_pass_loader(train, batch_size=3)] == [3]


def gray_folder(folder, *pictures):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return {"train_data_dir": str(folder), "resolution": 8, "image_channels": 1, "validation_fraction": 0.2}


def test_range_of_16_bit_images_is_said_and_little_use_of_it_is_warned_of(tmp_path, caplog):
    caplog.set_level("INFO")
    ramp = np.arange(64).reshape(8, 8)
    narrow, wide = (ramp * 65).astype(np.uint16), (ramp * 1000).astype(np.uint16)
    flags = gray_folder(tmp_path / "narrow", *[narrow] * 5)
    load_images(DataConfig(**flags))
    assert "their values lie in [0, 4095], the range is taken as [0, 65535]" in caplog.text
    assert "use little of [0, 65535]" in caplog.text and "pass `--value_range 0 4095`" in caplog.text
    caplog.clear()
    load_images(DataConfig(**flags, value_range=[0, 4095]))
    assert (
        "their values lie in [0, 4095], the range is taken as [0, 4095]" in caplog.text
        and "little of" not in caplog.text
    )
    caplog.clear()
    load_images(DataConfig(**gray_folder(tmp_path / "wide", *[wide] * 5)))
    assert (
        "their values lie in [0, 63000], the range is taken as [0, 65535]" in caplog.text
        and "little of" not in caplog.text
    )


@pytest.mark.parametrize("first", [np.uint8, np.uint16])
def test_16_bit_images_with_8_bit_values_among_8_bit_ones_are_warned_of(first, tmp_path, caplog):
    other = np.uint16 if first is np.uint8 else np.uint8
    ramp = np.arange(64).reshape(8, 8) * 4
    flags = gray_folder(tmp_path / "mixed", *[ramp.astype(kind) for kind in (first, first, other, other, other)])
    load_images(DataConfig(**flags))
    assert "use little of [0, 65535]" in caplog.text and "8-bit pictures lie beside them" in caplog.text


def test_rare_16_bit_image_with_8_bit_values_is_named_when_it_is_read(tmp_path, caplog):
    gray = np.full((8, 8), 200, np.uint8)
    images, _ = load_images(DataConfig(**gray_folder(tmp_path / "mixed", *[gray] * 3)))
    dark = encoded(Image.fromarray(gray.astype(np.uint16)))
    for _ in range(2):
        images._reader.read({"bytes": dark, "path": "dark.png"}, lambda: "dark.png")
    assert caplog.text.count("the image dark.png has 16 bits but no value above 200") == 1


def npy_header(shape) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_header((2_000_000, 1_000_000, 3)), "6000000000000 values, but an image may have at most"),
        (npy_header((1000, 1000, 1)), "needs 4000000 bytes, but only 100 are there"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "not a picture in a supported format"),
    ],
)
def test_claims_of_a_file_are_not_believed(content, message, tmp_path):
    """It is named, and skipped where that is asked for; nothing of the size is taken, no other program started."""
    good = npy_of(np.eye(8)) if content.startswith(b"\x93NUMPY") else encoded(Image.new("L", (8, 8)))
    flags = parquet_of(tmp_path, good, content, good)
    train, _ = load_images(DataConfig(**flags, value_range=[0, 1]))
    with pytest.raises(UserError, match=f"row 1 of the dataset cannot be decoded .*{message}"):
        train[1]
    assert len(load_images(DataConfig(**flags, value_range=[0, 1], on_bad_image="skip"))[0]) == 1


def test_huge_file_is_not_read(tmp_path):
    flags = gray_folder(tmp_path / "images", *[np.zeros((8, 8), np.uint8)] * 4)
    with open(tmp_path / "images" / "huge.png", "wb") as file:
        file.truncate(10 * 2**30)  # a hole, not on the disk
    with pytest.raises(UserError, match="huge.png cannot be decoded .the file has more than 2 GiB"):
        for images in load_images(DataConfig(**flags)):
            list(make_pass_loader(images, batch_size=2))


@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 900)])
@pytest.mark.parametrize("seed", [None, 0])
def test_long_images_are_cut_before_they_are_enlarged(shape, is_array, seed):
    """One of 20,000 x 1 pixels would have 5 million x 256."""
    random = None if seed is None else np.random.default_rng(seed)
    ramp = np.linspace(0, 255, max(shape), dtype=np.float32).reshape([-1 if n > 9 else 1 for n in shape])
    ramp = np.broadcast_to(ramp, shape).copy()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if is_array:
        pixels = resize_and_crop_array(ramp[..., None], 256, random=random)[..., 0]
    else:
        pixels = np.asarray(resize_and_crop(Image.fromarray(ramp.astype(np.uint8)), 256, random=random))
    assert pixels.shape == (256, 256) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000  # KB
    assert pixels.max() - pixels.min() <= 3
    if seed is None:
        assert abs(pixels.mean() - 127.5) < 1.5


def test_image_that_memory_does_not_suffice_for_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("Unable to allocate 8 GiB")

    train, _ = load_images(DataConfig(**gray_folder(tmp_path / "images", *[np.zeros((8, 8), np.uint8)] * 4)))
    monkeypatch.setattr("dae_diffusers.data.images.decode_image", fail)
    with pytest.raises(UserError, match="png cannot be decoded .it does not fit into memory: Unable to allocate"):
        train[0]


def jpeg_2000_of(bits: int, signed: bool = False) -> bytes:
    """A file that says so of its three channels; Pillow writes none."""
    data = bytearray(encoded(Image.new("RGB", (8, 8), (5, 6, 7)), "jpeg2000"))
    start = data.find(b"\xff\x4f\xff\x51") + 42
    data[start : start + 9 : 3] = bytes([bits - 1 + 128 * signed] * 3)
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jpeg_2000_of(16), "more than 8 bits in each channel"),
        (jpeg_2000_of(8, signed=True), "signed 8-bit numbers"),
        (tiff_of(np.arange(-32, 32, dtype=np.int8).reshape(8, 8)), "signed 8-bit numbers"),
        (encoded(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), "sgi", bpc=2), "more than 8 bits in each channel"),
    ],
)
def test_bits_and_signs_that_pillow_hides_are_said(content, message, tmp_path):
    with pytest.raises(LossyDepthError, match=message):
        find_depth(content)
    if "signed" in message:
        with pytest.raises(ValueError, match=message):
            decode_image(content)
    assert find_depth(jpeg_2000_of(8)) == "8-bit"


@pytest.mark.parametrize("first", ["deep", "colour"])
def test_16_bit_gray_and_8_bit_colour_pictures_become_rgb_together(first, tmp_path):
    for number in range(6):
        is_deep = (number % 2 == 0) == (first == "deep")
        pixels = np.full((8, 8), 51400, np.uint16) if is_deep else np.full((8, 8, 3), (200, 0, 255), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    train, validation = load_images(DataConfig(train_data_dir=str(tmp_path), resolution=8, image_channels=3))
    seen = [images[n]["pixel_values"][:, 0, 0] for images in (train, validation) for n in range(len(images))]
    colours = sorted(tuple(((each + 1) * 127.5).round().int().tolist()) for each in seen)
    assert colours == [(200, 0, 255)] * 3 + [(200, 200, 200)] * 3


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        (Image.new("F", (8, 8), 0.5), 3, r"shape \(8, 8, 1\).* if all images are gray, give `image_channels 1`"),
        (Image.new("CMYK", (8, 8)), 4, "its four channels are CMYK; save it as RGB or RGBA, or as `.npy`"),
    ],
)
def test_pictures_with_other_channels_are_refused_with_advice(tmp_path, image, channels, message):
    for number in range(2):
        image.save(tmp_path / f"{number}.tif")
    with pytest.raises(UserError, match=message):
        config = DataConfig(
            train_data_dir=str(tmp_path), resolution=8, image_channels=channels, value_range=[0.0, 255.0]
        )
        load_images(config)[0][0]


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """24 arrays of four bands in different units, as Parquet."""
    folder, random = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    maxima = np.array([3000, 0.5, 0.03, 1e-6], np.float32)
    arrays = [npy_of(random.uniform(0, 1, (8, 8, 4)).astype(np.float32) * maxima) for _ in range(24)]
    return parquet_of(folder, *arrays) | {"image_channels": 4}


@pytest.mark.parametrize("source", ["measured", "given", "streamed", "of a model"])
def test_channels_that_a_range_leaves_nothing_of_are_named(source, bands, caplog):
    flags = {"streaming": source == "streamed"} | (
        {"value_range": [0, 3000]} if source in ("given", "streamed") else {}
    )
    train, _ = load_images(DataConfig(**bands, **flags), value_range=[0, 3000] if source == "of a model" else None)
    (text,) = train.range_warnings
    assert text in caplog.text and "of 4 channels these use less than 1 % of the range [" in text
    named = re.findall(r"(\d) \(in \[(\S+), (\S+)\]\)", text)
    assert [int(number) for number, _, _ in named] == [2, 3, 4]  # counted from 1
    for (_, low, high), most in zip(named, (0.5, 0.03, 1e-6), strict=True):
        assert 0 <= float(low) < 0.1 * most < 0.9 * most < float(high) <= most
    assert "Scale all channels to similar ranges first" in text


def test_a_channel_beside_the_range_is_named():
    survey = ValueSurvey(1)
    survey.add(np.array([[[0.0, 5.0, 0.0], [1.0, 9.0, 0.0]]], np.float32))
    assert "2 (in [5, 9]), 3 (in [0, 0])" in survey.small_channels([0, 1])
    assert survey.range == [0, 9] and "3 (in [0, 0])" in survey.small_channels(survey.range)
    many = ValueSurvey(1)
    many.add(np.linspace(0, 1, 40, dtype=np.float32)[:, None] * ([1] + [0] * 30))
    assert "13 (in [0, 0]) and 18 more." in many.small_channels([0, 1])


def with_outlier(folder) -> dict:
    random = np.random.default_rng(0)
    arrays = [random.uniform(20, 30, (16, 16)).astype(np.float32) for _ in range(20)]
    arrays[7][8, 8] = -9999
    return parquet_of(folder, *map(npy_of, arrays)) | {"resolution": 16, "validation_fraction": 0.05}


def test_an_outlier_that_widens_the_range_is_said_with_what_to_do(tmp_path, caplog):
    flags = with_outlier(tmp_path)
    train, validation = load_images(DataConfig(**flags))
    (text,) = train.range_warnings
    assert len(validation) == 1 and train.value_range[0] == -9999 and text in caplog.text
    low, high = map(float, re.search(r"pass `--value_range (\S+) (\S+)`", text).groups())
    assert 20 <= low < 20.1 and 29.9 < high <= 30 and "0.1 % of the range [-9999, " in text
    caplog.clear()
    train, _ = load_images(DataConfig(**flags, value_range=[low, high]))
    assert train.range_warnings == [] and "range" not in caplog.text


def test_values_in_other_units_than_the_models_are_said(tmp_path, caplog):
    train, _ = load_images(DataConfig(**with_outlier(tmp_path)), value_range=[0, 3000])
    assert "of the range [0, 3000] of the trained model: the images look alike to it" in train.range_warnings[0]
    assert train.range_warnings[0] in caplog.text


def test_few_values_other_than_one_have_no_range_to_pass():
    survey = ValueSurvey(1)
    survey.add(np.eye(1, 5000, dtype=np.float32).T)
    assert "0 % of the range [0, 1]: a few" in survey.outliers([0, 1], is_measured=True)
    assert "give a narrower `--value_range`, which clips them" in survey.outliers([0, 1], is_measured=True)


def test_the_survey_of_many_images_is_that_of_their_values():
    values = np.random.default_rng(0).normal(size=(300, 128, 64, 2)).astype(np.float32)
    survey = ValueSurvey(len(values))  # which looks at a fifth of them
    for each in values:
        survey.add(each)
    assert survey.range == [values.min(), values.max()]
    assert survey.small_channels(survey.range) is None and survey.outliers(survey.range, is_measured=True) is None
    wide = survey.outliers([-100, 100], is_measured=True)
    found = [float(each) for each in re.search(r"are (\S+) and (\S+),", wide).groups()]
    np.testing.assert_allclose(found, np.percentile(values, [0.1, 99.9]), rtol=0.03)


@pytest.mark.parametrize("kind", ["alike channels", "one channel", "pictures"])
def test_nothing_is_said_of_ranges_that_are_used(kind, tmp_path, caplog):
    random = np.random.default_rng(0)
    if kind == "pictures":  # all red, with a range that was given
        save_pictures(tmp_path, *[np.full((8, 8, 3), (number, 0, 0), np.uint8) for number in range(8)])
        flags = {"train_data_dir": str(tmp_path), "resolution": 8, "value_range": [0, 255]}
    else:
        channels = 1 if kind == "one channel" else 3
        arrays = [npy_of(random.normal(size=(8, 8, channels)).astype(np.float32)) for _ in range(8)]
        flags = parquet_of(tmp_path, *arrays) | {"image_channels": channels}
    assert load_images(DataConfig(**flags))[0].range_warnings == [] and "range" not in caplog.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pictures_of_all_modes_are_read_with_four_channels(mode):
    image = Image.new("RGBA", (6, 4), (255, 255, 255, 255))
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.new("L", (6, 4), 128))
    expected = [255, 255, 255, 128 if mode in ("LA", "RGBA") else 255]
    array = decode_array(encoded(image.convert(mode), "png"), channels=4)
    assert array.shape == (4, 6, 4) and array.reshape(-1, 4).tolist() == [expected] * 24


@pytest.mark.parametrize(("format", "seen"), [("png", [255, 255, 255, 0]), ("tiff", [9, 90, 200, 0])])
def test_colours_that_nobody_sees_are_white(format, seen):
    array = decode_array(encoded(Image.new("RGBA", (6, 4), (9, 90, 200, 0)), format), channels=4)
    assert array.reshape(-1, 4).tolist() == [seen] * 24


def test_transparent_pictures_are_judged_on_white():
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (3, 4, 8, 8), generator=random).float()
    opacity = pictures[:, 3:] / 255
    on_white = (opacity * pictures[:, :3] + (1 - opacity) * 255).round()
    prepare = partial(prepare_images, size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))
    torch.testing.assert_close(prepare(pictures / 127.5 - 1), prepare(on_white / 127.5 - 1))
    torch.testing.assert_close((as_rgb(pictures / 127.5 - 1) + 1) * 127.5, on_white, atol=0.51, rtol=0)
    with pytest.raises(ValueError, match="5 channels, but a vision model takes 1"):
        as_rgb(torch.zeros(1, 5, 8, 8))


def test_four_channels_of_numbers_are_no_pictures(tmp_path):
    pictures, numbers = tmp_path / "pictures", tmp_path / "numbers"
    for folder in (pictures, numbers):
        folder.mkdir()
    for number in range(4):
        array = np.full((8, 8, 4), 60 * number, np.uint8)
        Image.fromarray(array).save(pictures / f"{number}.png")
        np.save(numbers / f"{number}.npy", array)
    for folder in (pictures, numbers):
        config = DataConfig(train_data_dir=str(folder), resolution=8, image_channels=4)
        assert load_images(config)[0][0]["pixel_values"].shape == (4, 8, 8)
        config.require_pictures("`perceptual_model`")
        if folder == numbers:
            with pytest.raises(
                UserError, match="is 4, but `perceptual_model` takes pictures: gray, RGB, or RGBA of 8 bits"
            ):
                load_images(config)
        else:
            load_images(config)
