"""Buckets: images keep about their proportions, and every micro-batch has one shape."""

import itertools
import logging
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from PIL import ExifTags, Image
from scripts import TINY_DAE, TINY_DIT, assert_same_weights, log_of, resume, run, start, weights

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.autoencoders.loading import encode_moments, load_autoencoder
from dae_diffusers.data import DataConfig, MicrobatchSampler, load_images, make_pass_loader, resize_and_crop
from dae_diffusers.data.buckets import Buckets, spread_shapes
from dae_diffusers.errors import ConfigError
from dae_diffusers.latents.cache import CachedLatents, follow_cache, image_identity
from dae_diffusers.randomness import derived_seed
from dae_diffusers.settings import compose
from dae_diffusers.training import cache_latents, evaluate, preview, train_dae, train_dit
from dae_diffusers.training.settings import TrainDAEConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than a bucket")
SHAPES = [8, 32, 16, 16, 32, 8]
FLAGS = " --aspect_buckets " + " ".join(map(str, SHAPES))
BUCKETS = Buckets(((8, 32), (16, 16), (32, 8)), (7, 16, 2))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """24 wide, square and tall pictures in two classes; a tall one that its EXIF data turn; validation pictures of all kinds."""
    root, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    sizes = [(36, 10)] * 6 + [(20, 20)] * 10 + [(20, 21)] * 6 + [(9, 40)] + [(40, 9)]  # width and height
    for split, some in (("train", sizes), ("test", sizes[::4])):
        for number, (width, height) in enumerate(some):
            folder = root / split / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
            exif = Image.Exif()
            if number == 23:
                exif[ExifTags.Base.Orientation] = 6  # stored lying, shown upright
            image.save(folder / f"{number:02d}.png", exif=exif)
    return root


def taken(sampler, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(iter(sampler), count))


def test_one_bucket_is_the_order_without_buckets():
    """Written the slow way."""
    expected, position = [], 0
    while position < 60:
        order = np.random.default_rng((3, position // 10)).permutation(10)
        expected.append((order[position % 10], derived_seed(3, 1, position)))
        position += 1
    found = taken(MicrobatchSampler(10, 4, 3, buckets=Buckets(((8, 8),), (10,))), 15)
    assert [item for batch in found for item in batch] == expected


@pytest.mark.parametrize("batch_size", [1, 3, 4, 30])
def test_batches_have_one_shape_and_images_come_equally_often(batch_size):
    batches = taken(MicrobatchSampler(25, batch_size, 0, buckets=BUCKETS), 200)
    seen = Counter()
    for batch in batches:
        assert len(batch) == batch_size and len({BUCKETS.of(index) for index, _ in batch}) == 1
        seen.update(index for index, _ in batch)
        for images in BUCKETS.ranges:  # within a bucket at any moment
            assert max(seen[n] for n in images) - min(seen[n] for n in images) <= 1
    draws = [draw for batch in batches for _, draw in batch]
    assert len(set(draws)) == len(draws)
    shares = [sum(seen[n] for n in images) / len(images) for images in BUCKETS.ranges]
    largest = max(-(-batch_size // count) for count in BUCKETS.counts)  # of a whole micro-batch
    assert max(shares) - min(shares) <= 2 * largest + 1
    order = [BUCKETS.of(batch[0][0]) for batch in batches[:40]]
    assert order != sorted(order)


def test_order_starts_anywhere_and_processes_share_it():
    batches = taken(MicrobatchSampler(25, 4, 1, buckets=BUCKETS), 60)
    for begin in (1, 6, 7, 31):
        assert taken(MicrobatchSampler(25, 4, 1, begin, BUCKETS), 20) == batches[begin : begin + 20]
    shares = [taken(BatchSamplerShard(MicrobatchSampler(25, 4, 1, buckets=BUCKETS), 2, n), 30) for n in range(2)]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == batches


@pytest.mark.parametrize(("size", "number", "multiple"), [((64, 64), 5, 8), ((256, 256), 9, 16), ((80, 64), 3, 8)])
def test_spread_shapes_have_about_one_area(size, number, multiple):
    shapes = spread_shapes(size, number, multiple)
    assert len(shapes) == number and tuple(shapes[number // 2]) == size
    assert all(side % multiple == 0 for shape in shapes for side in shape)
    areas = [height * width / (size[0] * size[1]) for height, width in shapes]
    assert 0.85 < min(areas) and max(areas) < 1.15
    ratios = [height / width for height, width in shapes]
    assert ratios == sorted(ratios)
    if size[0] == size[1]:
        assert shapes == [shape[::-1] for shape in reversed(shapes)]
        assert ratios[-1] == pytest.approx(2, rel=0.15)
    assert spread_shapes(size, 1, multiple) == [size]


def test_images_lie_bucket_after_bucket_in_the_nearest_shape(mixed):
    config = DataConfig(train_data_dir=str(mixed), resolution=16, aspect_buckets=SHAPES)
    train, validation = load_images(config)
    assert train.buckets == Buckets(((8, 32), (16, 16), (32, 8)), (6, 16, 2))
    for index in range(len(train)):
        size = train.buckets.sizes[train.buckets.of(index)]
        picture = Image.open(mixed / "train" / train.class_names_of([index])[0] / train.name_of(index).split("/")[-1])
        expected = np.asarray(resize_and_crop(Image.fromarray(shown(picture)), size), np.float32) / 127.5 - 1
        torch.testing.assert_close(train[index]["pixel_values"].permute(1, 2, 0), torch.from_numpy(expected))
    assert validation.buckets.sizes == ((16, 16),)
    plain, one = (
        load_images(DataConfig(train_data_dir=str(mixed), resolution=16, aspect_buckets=n))[0] for n in ([], [1])
    )
    assert one.fingerprint == plain.fingerprint and one.buckets == plain.buckets == Buckets.single(24, (16, 16))
    alike = train.in_one_shape()
    assert alike[23]["pixel_values"].shape == (3, 16, 16) and alike.labels == train.labels
    part = train.choose(12)
    assert sum(part.buckets.counts) == 12 and part.fingerprint != train.fingerprint != alike.fingerprint
    for process in range(2):
        loader = make_pass_loader(train, batch_size=5, process_index=process, num_processes=2)
        assert sum(len(batch["class_labels"]) for batch in loader) == 12  # stacked: of one shape each


def shown(picture: Image.Image) -> np.ndarray:
    is_turned = picture.getexif().get(ExifTags.Base.Orientation) == 6
    return np.asarray(picture.rotate(-90, expand=True) if is_turned else picture)


def test_arrays_have_buckets_too(tmp_path):
    for number, shape in enumerate([(1, 8, 30), (8, 30), (16, 17), (30, 8), (16, 16), (9, 30, 1)]):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).normal(size=shape).astype(np.float32))
    config = DataConfig(
        train_data_dir=str(tmp_path), resolution=16, image_channels=1, aspect_buckets=SHAPES, validation_fraction=0.1
    )
    train, _ = load_images(config)
    assert len(train.buckets.sizes) > 1 and sum(train.buckets.counts) == 5
    assert max(train[n]["pixel_values"].max() for n in range(5)) == 1  # the range is that of what training sees


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mixed):
    """An autoencoder, a cache of its latents, and transformers on images and on the cache."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("buckets")
    flags = TINY_DAE + FLAGS + " --random_flip --auxiliary_decoder dropout"
    run(train_dae, flags, train_data_dir=mixed, output_dir=folder)
    more = {"train_data_dir": mixed, "vae": folder / "vae"}
    run(cache_latents, f"--random_flip --dtype float32 --shard_size 5{FLAGS}", output_dir=folder / "latents", **more)
    run(train_dit, f"{TINY_DIT} --random_flip{FLAGS}", output_dir=folder, **more)
    run(train_dit, TINY_DIT, vae=folder / "vae", latent_cache=folder / "latents", output_dir=folder / "cached")
    return folder


def test_cache_holds_the_latents_of_each_image_in_shards_of_one_shape(trained, mixed):
    cache = CachedLatents(trained / "latents" / "train")
    images, _ = load_images(DataConfig(train_data_dir=str(mixed), resolution=16, aspect_buckets=SHAPES))
    vae = load_autoencoder(str(trained / "vae"))
    assert cache.buckets == images.buckets and len(cache._shards) == 2 + 4 + 1
    total = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    pixels = 0
    for index in range(len(images)):
        mean, std = encode_moments(vae, images[index]["pixel_values"][None])
        torch.testing.assert_close(cache[index]["latents_mean"], mean[0])
        assert cache[index]["class_labels"] == images[index]["class_labels"]
        total[0].add_(mean.double().sum((0, 2, 3)))
        total[1].add_((mean.double().square() + std.double().square()).sum((0, 2, 3)))
        pixels += mean[0, 0].numel()
    mean = total[0] / pixels  # the statistics are those of all buckets
    torch.testing.assert_close(torch.tensor(vae.config.latents_mean).double(), mean, atol=1e-5, rtol=1e-4)
    std = (total[1] / pixels - mean.square()).sqrt()
    torch.testing.assert_close(torch.tensor(vae.config.latents_std).double(), std, atol=1e-5, rtol=1e-4)


def test_cache_trains_as_its_images_do_and_the_pipeline_draws_the_resolution(trained):
    found = [weights(trained / folder / "pipeline" / "transformer") for folder in (".", "cached")]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-5, rtol=1e-4)
    pipeline = DAEDiTPipeline.from_pretrained(trained / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([0], num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
    tall = pipeline([0], num_inference_steps=1, output_type="pt", height=32, width=8).images
    assert tall.shape == (1, 3, 32, 8)


@pytest.mark.parametrize("script", [train_dae, train_dit])
def test_resumed_run_equals_the_uninterrupted_one(script, trained, mixed, tmp_path):
    flags, results, more = TINY_DIT, ("pipeline",), {"vae": trained / "vae"}
    if script is train_dae:
        flags, results, more = f"{TINY_DAE} --auxiliary_decoder dropout", ("vae", "stage1", "pipeline"), {}
    resume(
        script, flags + FLAGS + " --random_flip", trained, tmp_path / "run", 3, results, train_data_dir=mixed, **more
    )
    result = "vae" if script is train_dae else "pipeline/transformer"
    assert_same_weights(weights(tmp_path / "run" / result), weights(trained / result))
    name = script.__name__.rpartition(".")[-1]
    assert log_of(tmp_path / "run", name) == log_of(trained, name)


def test_preview_and_dry_run_count_the_buckets(mixed, tmp_path, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"train_data_dir": str(mixed), "resolution": 16, "aspect_buckets": SHAPES}
    preview.main(compose(preview.PreviewConfig, **settings, output_dir=str(tmp_path)))
    text = "8x32 (6 images), 16x16 (16 images), 32x8 (2 images)"
    assert f"Shapes: {text}" in (tmp_path / "preview.md").read_text()
    with caplog.at_level(logging.INFO):
        run(train_dae, f"{TINY_DAE} --dry_run --aspect_buckets 3", train_data_dir=mixed, output_dir=tmp_path / "dry")
    assert "3 of 3 shapes have images: 12x24 (6 images), 16x16 (16 images), 24x12 (2 images)" in caplog.text


def test_other_buckets_are_refused_where_a_run_goes_on(trained, mixed, tmp_path, capsys):
    flags = {"vae": trained / "vae", "train_data_dir": mixed, "output_dir": tmp_path}
    for words in ("", " --aspect_buckets 1"):
        with pytest.raises(SystemExit):
            start(TINY_DIT + " --random_flip" + words, train_dit, latent_cache=trained / "latents", **flags)
        assert "does not fit: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(
            TINY_DIT + FLAGS.replace("8 32 ", ""),
            train_dit,
            resume_from_checkpoint="latest",
            **{**flags, "output_dir": trained},
        )
    assert "the training images changed" in capsys.readouterr().err


def test_one_bucket_of_another_shape_is_not_that_of_the_resolution(trained, mixed, tmp_path, capsys, monkeypatch):
    for split in ("train", "test"):
        for number in range(4):  # all wide
            (tmp_path / "wide" / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(mixed / "train" / ("cat", "dog")[number % 2] / f"{number:02d}.png", tmp_path / "wide" / split)
    flags = {"train_data_dir": str(tmp_path / "wide"), "resolution": 16}
    cut, wide = (load_images(DataConfig(**flags, aspect_buckets=shapes))[0] for shapes in ([], SHAPES))
    assert wide.buckets.sizes == ((8, 32),) and wide.fingerprint != cut.fingerprint
    assert image_identity(wide)["buckets"] == [[8, 32, 4]] and image_identity(cut)["buckets"] == []
    flags, cache = {"train_data_dir": tmp_path / "wide", "vae": trained / "vae"}, tmp_path / "latents"
    run(cache_latents, "--dtype float32" + FLAGS, output_dir=cache, **flags)
    assert CachedLatents(cache / "train").buckets == wide.buckets
    data = DataConfig()
    follow_cache(data, CachedLatents(cache / "train"))
    assert data.shapes == [(8, 32), (16, 16)]
    run(
        train_dit, TINY_DIT + " --max_train_steps 1", vae=trained / "vae", latent_cache=cache, output_dir=tmp_path / "a"
    )
    with pytest.raises(SystemExit):
        start(TINY_DIT, train_dit, latent_cache=cache, output_dir=tmp_path / "b", **flags)
    assert "does not fit: " in capsys.readouterr().err
    monkeypatch.setattr(Buckets, "record", lambda self, size: [])  # as caches of earlier versions have it
    run(cache_latents, "--dtype float32" + FLAGS, output_dir=tmp_path / "old", **flags)
    with pytest.raises(SystemExit):
        start(TINY_DIT, train_dit, latent_cache=tmp_path / "old", output_dir=tmp_path / "c", **flags)
    assert "have the size 4x16, but those of `--vae` have 8x8" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_bucket_smaller_than_a_batch_is_said(mixed, tmp_path):
    with pytest.warns(UserWarning, match=r"4 is larger than a bucket: 32x8 \(2 images\): images repeat"):
        run(train_dae, f"{TINY_DAE} --stage1_steps 1 --dry_run{FLAGS}", train_data_dir=mixed, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aspect_buckets": [4]}, "`aspect_buckets` is 4, but must be odd"),
        ({"aspect_buckets": [16, 16, 32]}, "one number, or a height and a width for each shape"),
        ({"aspect_buckets": [8, 32, 32, 8]}, "without `resolution` 16x16"),
        ({"aspect_buckets": [16, 16, 30, 8]}, "`aspect_buckets` 30 is not divisible by 4.* 28 and 32"),
        ({"aspect_buckets": [3], "condition_column": "mask"}, "does not go with `condition_column`"),
        ({"aspect_buckets": [0, 16]}, "`aspect_buckets` is 0, but must be in"),
        ({"aspect_buckets": [3], "dataset_name": "user/data", "streaming": True}, "does not go with `streaming`"),
    ],
)
def test_buckets_that_do_not_work(values, message):
    with pytest.raises(ConfigError, match=message):
        compose(TrainDAEConfig, **{"dataset_name": "digits", "resolution": 16, **values})


def test_scripts_of_one_shape_refuse_buckets(trained, mixed):
    with pytest.raises(ConfigError, match="`aspect_buckets` does not go with evaluate.py"):
        compose(evaluate.EvaluateConfig, train_data_dir=str(mixed), vae=str(trained / "vae"), aspect_buckets=SHAPES)
