"""Data sets that are read as they come: nothing twice, nothing lost, and an order that a run goes on with exactly."""

import io
import itertools
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import TINY_DAE, TINY_DIT, assert_same_weights, launch, resume, run, succeed, weights

from dae_diffusers.data import (
    DataConfig,
    ImageStream,
    StreamedImages,
    load_images,
    make_pass_loader,
    make_stream_loader,
)
from dae_diffusers.data import streaming as streaming_module
from dae_diffusers.data.contents import content_hash
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.training import train_dae, train_dit

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_IMAGES = 50


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 5 * number).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(folder, num_shards: int, split: str = "train", first: int = 0, number: int = NUM_IMAGES):
    """Grey images whose value is five times their number, of two classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    folder.mkdir(exist_ok=True)
    for shard, numbers in enumerate(np.array_split(np.arange(first, first + number), num_shards)):
        rows = [{"image": {"bytes": png(int(n)), "path": None}, "label": int(n) % 2} for n in numbers]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-{shard:05d}.parquet")
    return folder


def config_of(folder, **more) -> DataConfig:
    return DataConfig(
        dataset_name=str(folder), streaming=True, image_channels=1, resolution=8, **{"shuffle_buffer_size": 7, **more}
    )


@pytest.fixture(scope="module", params=[1, 5])
def parquet(request, tmp_path_factory):
    folder = write_parquet(tmp_path_factory.mktemp("parquet"), request.param)
    return write_parquet(folder, 1, "test", first=0, number=4)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """48 photographs' stand-ins in three webdataset shards."""
    folder = tmp_path_factory.mktemp("tars")
    random = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for number in range(16):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "jpeg")
                for suffix, content in (("jpg", buffer.getvalue()), ("cls", str(number % 2).encode())):
                    info = tarfile.TarInfo(f"{shard:03d}{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def numbers_of(batch: dict[str, torch.Tensor]) -> list[int]:
    values = ((batch["pixel_values"][:, 0, 0, 0] + 1) * 255 / 2 / 5).round().int().tolist()
    if "class_labels" in batch:
        assert [value % 2 for value in values] == batch["class_labels"].tolist()
    return values


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_brings_every_image_once_over_all_processes(parquet, num_processes, num_workers):
    train, _ = load_images(config_of(parquet))
    seen = []
    for index in range(num_processes):
        share = {"process_index": index, "num_processes": num_processes}
        for batch in make_pass_loader(train, batch_size=4, num_workers=num_workers, **share):
            assert len(batch["pixel_values"]) <= 4
            seen += numbers_of(batch)
    assert sorted(seen) == list(range(NUM_IMAGES))


def test_a_pass_over_a_long_stream_ends(parquet, monkeypatch):
    monkeypatch.setattr("dae_diffusers.data.loaders.STREAM_PASS_SAMPLES", 9)
    train, _ = load_images(config_of(parquet))
    assert [len(batch["pixel_values"]) for batch in make_pass_loader(train, batch_size=4)] == [4, 4, 1]


def test_passes_follow_each_other_in_another_order_each(parquet):
    train, _ = load_images(config_of(parquet))
    seen = [row.number for batch in itertools.islice(ImageStream(train, 5, seed=3), 20) for row in batch]
    assert seen == list(range(2 * NUM_IMAGES))
    loader = make_stream_loader(ImageStream(train, 5, seed=3))
    numbers = [number for batch in itertools.islice(loader, 20) for number in numbers_of(batch)]
    first, second = numbers[:NUM_IMAGES], numbers[NUM_IMAGES:]
    assert sorted(first) == sorted(second) == list(range(NUM_IMAGES))
    assert first != second and first != sorted(first)
    other = next(iter(make_stream_loader(ImageStream(train, 5, seed=4))))
    assert numbers_of(other) != numbers[:5]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("taken", [0, 1, 6, 7, 14, 23])
def test_stream_goes_on_from_any_batch(parquet, taken, num_processes):
    share = {"seed": 1, "process_index": num_processes - 1, "num_processes": num_processes}
    train, _ = load_images(config_of(parquet, random_flip=True))
    whole = ImageStream(train, 3, **share)
    loader = iter(make_stream_loader(whole, num_workers=1))  # reads ahead
    for _ in range(taken):
        next(loader)
    state = json.loads(json.dumps(whole.state_after(taken)))
    rest = make_stream_loader(ImageStream(train, 3, state=state, **share))
    for expected, batch in itertools.islice(zip(loader, rest, strict=False), 25):
        assert torch.equal(expected["pixel_values"], batch["pixel_values"])
        assert torch.equal(expected["class_labels"], batch["class_labels"])


def test_state_of_another_block_size_is_refused(parquet):
    state = ImageStream(load_images(config_of(parquet))[0], 3, seed=0).state_after(0)
    train, _ = load_images(config_of(parquet, shuffle_buffer_size=8))
    with pytest.raises(UserError, match="with 7"):
        ImageStream(train, 3, seed=0, state=state)


def test_held_out_images_are_never_trained_on(tmp_path):
    config = config_of(write_parquet(tmp_path / "data", 3), max_validation_samples=6, validation_fraction=0.5)
    train, validation = load_images(config)
    held_out = [n for batch in make_pass_loader(validation, batch_size=4) for n in numbers_of(batch)]
    seen = [n for batch in make_pass_loader(train, batch_size=4) for n in numbers_of(batch)]
    assert len(held_out) == 6 and sorted(seen + held_out) == list(range(NUM_IMAGES))


def test_held_out_images_of_one_class_are_said(tmp_path, caplog):
    folder = write_parquet(tmp_path / "sorted", 1)
    rows = datasets.load_dataset(str(folder), split="train")
    rows.select(np.argsort(rows["label"], kind="stable")).to_parquet(folder / "train-00000.parquet")
    load_images(config_of(folder, max_validation_samples=3))
    assert "images that are held out are of the class 'even', the first of the stream" in caplog.text


def test_no_image_left_is_a_sentence(tmp_path):
    train, _ = load_images(config_of(write_parquet(tmp_path / "data", 1, number=8), max_validation_samples=1))
    train.held_out = frozenset(content_hash({"bytes": png(number)}) for number in range(8))
    with pytest.raises(UserError, match="Lower `max_validation_samples`"):
        next(iter(ImageStream(train, 2, seed=0)))


def test_small_stream_holds_out_a_share(tars):
    config = DataConfig(train_data_dir=str(tars), streaming=True, resolution=8, validation_fraction=0.25)
    train, validation = load_images(config)
    assert len(validation) == 12 and train.num_examples == 48


def test_more_files_than_shards_are_dealt_in_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming_module, "_MAX_SHARDS", 3)
    train, _ = load_images(config_of(write_parquet(tmp_path / "data", 8), max_validation_samples=2))
    seen = [n for batch in make_pass_loader(train, batch_size=4) for n in numbers_of(batch)]
    assert len(seen) == len(set(seen)) == NUM_IMAGES - 2


def bad_parquet(folder, bad: set[int]):
    features = datasets.Features({"image": datasets.Image()})
    content = [b"damaged" if n in bad else png(n) for n in range(20)]
    rows = [{"image": {"bytes": value, "path": f"{n}.png"}} for n, value in enumerate(content)]
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


def test_bad_image_is_named_or_replaced_by_another_of_its_batch(tmp_path, caplog):
    folder = bad_parquet(tmp_path / "data", {11})
    train, _ = load_images(config_of(folder, max_validation_samples=2))
    with pytest.raises(UserError, match="11.png cannot be decoded"):
        list(make_pass_loader(train, batch_size=4))
    train, _ = load_images(config_of(folder, max_validation_samples=2, on_bad_image="skip"))
    seen = [n for batch in make_pass_loader(train, batch_size=4) for n in numbers_of(batch)]
    assert len(seen) == 18 and set(seen) == set(range(2, 20)) - {11}
    assert "left out: the image 11.png" in caplog.text


def test_too_many_bad_images_stop(tmp_path):
    folder = bad_parquet(tmp_path / "data", set(range(5, 20, 2)))
    train, _ = load_images(config_of(folder, max_validation_samples=2, on_bad_image="skip", max_bad_image_share=0.005))
    with pytest.raises(UserError, match="6 of .* images are bad"):
        list(make_pass_loader(train, batch_size=9))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_data_dir": "{tars}", "dataset_name": None, "label_column": "cls"}, "Give `num_classes`"),
        ({"train_data_dir": "{tars}", "dataset_name": None, "label_column": "cls", "num_classes": 1}, "0..0"),
        ({"train_data_dir": "{images}", "dataset_name": None}, "holds no webdataset"),
        ({"train_split": "nothing"}, "`train_split` 'nothing' does not exist"),
        ({"image_channels": 2}, "give `value_range LOW HIGH`"),
    ],
)
def test_what_a_stream_cannot_do_is_a_sentence(flags, message, tars, image_folder, tmp_path):
    places = {"tars": str(tars), "images": str(image_folder)}
    flags = {name: value.format(**places) if isinstance(value, str) else value for name, value in flags.items()}
    folder = write_parquet(tmp_path / "data", 1)
    config = DataConfig(
        **{"dataset_name": str(folder), "streaming": True, "image_channels": 3, "resolution": 8, **flags}
    )
    if "image_channels" in flags:
        config.image_column = "image"
        rows = datasets.Dataset.from_dict({"image": [np.zeros((8, 8, 2)).tolist()] * 4})
        rows.to_parquet(folder / "train-00000.parquet")
    with pytest.raises(UserError, match=message):
        list(make_pass_loader(load_images(config)[0], batch_size=4))


def test_flags_that_exclude_each_other():
    for flags in ({"max_train_samples": 3}, {"dataset_name": "digits"}):
        with pytest.raises(ConfigError, match="streaming"):
            DataConfig(streaming=True, **flags)
    with pytest.raises(ConfigError, match="goes with `streaming`"):
        DataConfig(num_classes=3)


def test_tar_files_are_read_from_the_disk_too(tars):
    train, validation = load_images(DataConfig(train_data_dir=str(tars), resolution=16, label_column="cls"))
    assert len(train) + len(validation) == 48 and train.id2label == {0: "0", 1: "1"}
    assert train[0]["pixel_values"].shape == (3, 16, 16)


STREAM = " --streaming --label_column cls --num_classes 2 --max_validation_samples 8 --validation_fraction 0.5 --shuffle_buffer_size 10"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tars):
    """Both models, from a stream."""
    folder = tmp_path_factory.mktemp("run")
    run(train_dae, TINY_DAE + STREAM, train_data_dir=tars, output_dir=folder)
    run(train_dit, TINY_DIT + STREAM, train_data_dir=tars, output_dir=folder, vae=folder / "vae")
    return folder


@pytest.mark.parametrize("step", [3, 4, 6])
def test_resumed_autoencoder_equals_an_uninterrupted_one(trained, tars, tmp_path, step):
    resume(
        train_dae, TINY_DAE + STREAM + " --dataloader_num_workers 1", trained, tmp_path / "run", step,
        ("vae", "stage1"), train_data_dir=tars,
    )  # fmt: skip
    assert_same_weights(weights(trained / "vae"), weights(tmp_path / "run" / "vae"))
    logs = [(folder / "train_dae" / "log.jsonl").read_text() for folder in (trained, tmp_path / "run")]
    assert logs[0] == logs[1]


def test_resumed_transformer_equals_an_uninterrupted_one(trained, tars, tmp_path):
    options = {"train_data_dir": tars, "vae": trained / "vae"}
    resume(train_dit, TINY_DIT + STREAM, trained, tmp_path / "run", 3, ("pipeline",), **options)
    transformers = [weights(folder / "pipeline" / "transformer") for folder in (trained, tmp_path / "run")]
    assert_same_weights(*transformers)


@pytest.mark.parametrize(
    ("script", "before", "now"),
    [(train_dae, "max_validation_samples 8", 4), (train_dit, "validation_fraction 0.5", 0.1)],
)
def test_resumed_stream_holds_out_the_same_images(trained, tars, tmp_path, script, before, now):
    flags = (TINY_DAE if script is train_dae else TINY_DIT) + STREAM
    flags = flags.replace(before, f"{before.split()[0]} {now}") + f" --vae {trained / 'vae'}" * (script is train_dit)
    message = "was trained with `{}` {}, but now it is {}".format(*before.split(), now)
    with pytest.raises(UserError, match=message):
        resume(script, flags, trained, tmp_path / "run", 3, (), train_data_dir=tars)


def test_another_number_of_processes_begins_a_new_pass(trained, tars, tmp_path):
    flags = TINY_DAE + STREAM + " --train_batch_size 2"
    options = {"train_data_dir": tars, "output_dir": tmp_path}
    succeed(launch("train_dae", flags + " --stage 1", processes=2, **options))
    states = json.loads((tmp_path / "train_dae/checkpoints/checkpoint-00000003/checkpoint.json").read_text())
    assert [state["position"] for state in states["state"]["stream"]] == [6, 6]
    process = launch("train_dae", flags + " --stage 1 --resume_from_checkpoint latest", **options)
    output = process.communicate()[0]
    assert process.returncode == 0 and "it begins a new pass over the data" in output, output


def test_stream_that_breaks_off_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    trained, tars, tmp_path, monkeypatch
):
    options = {"train_data_dir": tars, "output_dir": tmp_path}
    calls = itertools.count()
    read = streaming_module._Place.read

    def broken(self, number):
        if next(calls) == 1:  # in the third step
            raise ConnectionError("the Hub\nis gone")
        return read(self, number)

    monkeypatch.setattr(streaming_module._Place, "read", broken)
    with pytest.raises(UserError, match="the stream broke off .the Hub is gone."):
        run(train_dae, TINY_DAE + STREAM + " --checkpointing_steps 1", **options)
    monkeypatch.undo()
    assert (tmp_path / "train_dae" / "checkpoints" / "checkpoint-00000002").is_dir()
    run(train_dae, TINY_DAE + STREAM + " --resume_from_checkpoint latest", **options)
    assert_same_weights(weights(trained / "vae"), weights(tmp_path / "vae"))


def test_share_of_time_spent_waiting_is_recorded(trained):
    for script in ("train_dae", "train_dit"):
        share = json.loads((trained / script / "run.json").read_text())["data_wait_share"]
        assert 0 <= share <= 1


def test_other_suffix_in_a_streamed_webdataset_is_said(tmp_path):
    """As `datasets` streams it from the Hub: only the suffixes of the first samples are columns."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(12):
            info = tarfile.TarInfo(f"{number:02d}.{'png' if number < 10 else 'bmp'}")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    rows = datasets.load_dataset("webdataset", data_files=str(tmp_path / "0.tar"), streaming=True)["train"]
    rows = rows.cast_column("png", datasets.Image(decode=False))
    config = config_of(tmp_path)
    images = StreamedImages(
        rows, config, image_column="png", label_column=None, id2label=None, depth="8-bit", fingerprint=""
    )
    with pytest.raises(UserError, match=r"is not a \.png file: .*Leave `streaming` out"):
        for batch in ImageStream(images, 4, seed=0, max_samples=12):
            images.__getitems__(batch)
