"""Drawn images depend on no batch, process or interruption, say how they were drawn, and can be trained on."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
)
from models import (
    make_autoencoder,
    make_plain_vq_model,
    make_prior_pipeline,
    make_random_transformer,
    save_text_encoder,
)
from PIL import Image
from scripts import in_both_processes, in_child, run, start

from dae_diffusers import DAEDiTPipeline, store
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.generators.text import load_text_encoder
from dae_diffusers.metrics.sample_folder import METADATA, SETTINGS, class_folders
from dae_diffusers.metrics.sampling import load_pipeline
from dae_diffusers.metrics.settings import OneSettingConfig
from dae_diffusers.store import read_rows
from dae_diffusers.training import sample
from dae_diffusers.training.settings import SampleConfig, with_flags

NAMES = {0: "cat", 1: "dog", 2: "elk"}
STEPS = "--num_inference_steps 2"


def make_pipeline(id2label=NAMES, *, channels=3, num_classes=3, transformer=None, **parts) -> DAEDiTPipeline:
    vae = make_autoencoder("none", in_channels=channels, out_channels=channels).to_diffusers()
    transformer = transformer or make_random_transformer(num_classes=num_classes)
    return DAEDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler(), id2label=id2label, **parts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What a training leaves: `pipeline` in its folder."""
    folder = tmp_path_factory.mktemp("run")
    make_pipeline(default_guidance_scale=1.5, default_num_inference_steps=2).save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save_text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory) -> Path:
    """Forty images in one go."""
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    run(sample, "--num_images 40", pipeline=trained, output_dir=folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All files that are no lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".owner")
    }


def rows_of(folder: Path) -> list[dict]:
    return read_rows(folder / METADATA)


def drawn_again(pipeline, row: dict, **options):
    """What the row's arguments draw alone, as the guide says."""
    row = dict(row)
    generator = torch.Generator().manual_seed(row.pop("seed"))
    del row["file_name"], row["number"]
    return pipeline(**row, generator=generator, **options).images[0]


@pytest.mark.parametrize("batch_size", [1, 24])
def test_images_do_not_depend_on_the_size_of_a_batch(batch_size, trained, drawn, tmp_path):
    run(sample, f"--num_images 40 --batch_size {batch_size}", pipeline=trained, output_dir=tmp_path)
    files = files_of(drawn)
    assert files_of(tmp_path) == files and len(set(files.values())) == 40 + len((METADATA, SETTINGS))


def test_two_processes_draw_what_one_does(trained, drawn, tmp_path):
    def action():
        start("--num_images 40 --batch_size 16", sample, pipeline=trained, output_dir=tmp_path)

    code, text = in_both_processes(action)
    assert code == 0, text
    assert files_of(tmp_path) == files_of(drawn)


def test_killed_drawing_goes_on_as_if_it_had_not_been(trained, drawn, tmp_path):
    """A kill while the twentieth image is written; one of the others is missing too, as after a kill of several processes."""

    def killed():
        written, rename = [], store._flush_and_rename

        def until_killed(temporary, path):
            written.append(path)
            if len(written) == 22:  # two of which tell the settings
                os.kill(os.getpid(), signal.SIGKILL)
            rename(temporary, path)

        store._flush_and_rename = until_killed
        start("--num_images 40 --batch_size 16", sample, pipeline=trained, output_dir=tmp_path)

    assert in_child(killed)[0] == -signal.SIGKILL
    rows = rows_of(tmp_path)
    there = [row["file_name"] for row in rows if (tmp_path / row["file_name"]).exists()]
    assert len(rows) == 40 and len(there) == 19 and list(tmp_path.rglob("*.png.*.tmp"))
    (tmp_path / there[3]).unlink()
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in there if (tmp_path / name).exists()}
    run(sample, "--num_images 40 --batch_size 16", pipeline=trained, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(drawn)
    assert kept == {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
    run(sample, "--num_images 7", pipeline=trained, output_dir=tmp_path)  # which are there
    assert files_of(tmp_path) == files_of(drawn)


def test_more_images_are_added_to_those_that_are_there(trained, drawn, tmp_path):
    for number in (13, 40):
        run(sample, f"--num_images {number}", pipeline=trained, output_dir=tmp_path)
    assert files_of(tmp_path) == files_of(drawn)


def test_rows_say_how_each_image_is_drawn_alone(trained, drawn):
    pipeline = load_pipeline(str(trained / "pipeline"), torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    rows = rows_of(drawn)
    assert [row["number"] for row in rows] == list(range(40)) and len({row["seed"] for row in rows}) == 40
    assert [row["class_labels"] for row in rows] == [NAMES[number % 3] for number in range(40)]
    for row in rows[:8]:
        assert row["file_name"] == f"{row['class_labels']}/{row['number']:06d}.png"
        assert {"guidance_scale": 1.5, "num_inference_steps": 2, "velocity_scale": 1.0}.items() <= row.items()
        again, image = np.asarray(drawn_again(pipeline, row)), np.asarray(Image.open(drawn / row["file_name"]))
        assert np.abs(again.astype(int) - image.astype(int)).max() <= 1  # rounding of another batch size


def test_prior_draws_with_its_own_options_unless_flags_name_others(tmp_path):
    pipeline = make_prior_pipeline()
    pipeline.register_to_config(default_top_k=5, default_temperature=0.7)
    pipeline.save_pretrained(tmp_path / "pipeline")
    run(sample, "--num_images 6 --top_p 0.9", pipeline=tmp_path, output_dir=tmp_path / "samples")
    rows = rows_of(tmp_path / "samples")
    options = {"guidance_scale": 2.0, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert all(options.items() <= row.items() and "num_inference_steps" not in row for row in rows)
    for row in rows:
        again = np.asarray(drawn_again(pipeline, row)).astype(int)
        assert np.abs(again - np.asarray(Image.open(tmp_path / "samples" / row["file_name"]))).max() <= 1


def test_folder_is_one_of_training_images_with_the_right_classes(drawn, caplog):
    train, validation = load_images(DataConfig(train_data_dir=str(drawn), resolution=16, validation_fraction=0.5))
    assert train.id2label == NAMES and sorted([*train.labels, *validation.labels]) == sorted(n % 3 for n in range(40))
    assert not [record for record in caplog.records if record.levelname == "WARNING"], caplog.text


def test_drawn_images_may_lie_beside_others(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "data" / "drawn")
    train, validation = load_images(
        DataConfig(train_data_dir=str(tmp_path / "data"), resolution=16, label_column="none")
    )
    assert len(train) + len(validation) == 40


def test_chosen_classes_are_drawn_equally_often(trained, tmp_path, caplog):
    run(sample, f"--num_images 7 --class_labels elk 0 {STEPS}", pipeline=trained, output_dir=tmp_path / "two")
    assert [row["class_labels"] for row in rows_of(tmp_path / "two")] == ["cat", "elk"] * 3 + ["cat"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == ["cat", "elk"]
    assert "are not drawn" not in caplog.text
    run(sample, "--num_images 2", pipeline=trained, output_dir=tmp_path / "few")
    assert "`--num_images` 2 of 3 classes: some of them are not drawn" in caplog.text


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        ({0: "a/b", 1: ".hidden", 2: "__init__"}, ["a%2Fb", "%2Ehidden", "%5F_init__"]),
        ({0: "..", 1: "new\nline", 2: "tabby, cat"}, ["%2E.", "new%0Aline", "tabby, cat"]),
        ({0: "Crane", 1: "crane", 2: " "}, ["Crane (0)", "crane (1)", "2"]),
        ({0: "a/b", 1: "a%2Fb", 2: "é"}, ["a%2Fb (0)", "a%2Fb (1)", "é"]),
        ({1: "0", 2: METADATA}, ["0 (0)", "0 (1)", f"{METADATA} (2)"]),
        ({0: "a", 1: "A", 2: "a (0)"}, ["0", "1", "2"]),
        ({0: "train", 1: "test", 2: "bus"}, ["train (0)", "test (1)", "bus"]),
        ({0: "ä" * 300, 1: "ä" * 300 + "b", 2: "ä"}, ["ä" * 100 + " (0)", "ä" * 100 + " (1)", "ä"]),
    ],
)
def test_classes_have_folders_of_their_own_whatever_they_are_called(names, folders, tmp_path):
    assert class_folders(names, 3) == folders
    make_pipeline(names).save_pretrained(tmp_path / "pipeline")
    run(sample, f"--num_images 6 {STEPS}", pipeline=tmp_path / "pipeline", output_dir=tmp_path / "samples")
    assert {row["file_name"].rpartition("/")[0] for row in rows_of(tmp_path / "samples")} == set(folders)
    train, _ = load_images(DataConfig(train_data_dir=str(tmp_path / "samples"), resolution=16, validation_fraction=0.5))
    assert set(train.id2label.values()) == set(folders)


def test_texts_are_given_or_lie_in_a_file(encoder, tmp_path, caplog):
    parts = dict(zip(("tokenizer", "text_encoder"), load_text_encoder(encoder), strict=True))
    transformer = make_random_transformer(num_classes=None, cross_attention_dim=16)
    pipeline = make_pipeline(None, transformer=transformer, **parts)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    (tmp_path / "texts.txt").write_bytes("\ufeffa red apple\r\n\n big dog \n".encode())
    flags = f"--num_images 5 --prompts {tmp_path / 'texts.txt'} {STEPS}"
    run(sample, flags, pipeline=tmp_path, output_dir=tmp_path / "from-file")
    argv = ["--pipeline", str(tmp_path), "--output_dir", str(tmp_path / "given"), *STEPS.split()]
    sample.main(parse_config(SampleConfig, [*argv, "--num_images", "5", "--prompts", "a red apple", "big dog"]))
    assert files_of(tmp_path / "given") == files_of(tmp_path / "from-file")
    rows = rows_of(tmp_path / "given")
    assert [row["prompt"] for row in rows] == ["a red apple", "big dog"] * 2 + ["a red apple"]
    image = np.asarray(Image.open(tmp_path / "given" / "000001.png")).astype(int)
    assert np.abs(image - np.asarray(drawn_again(pipeline, rows[1]))).max() <= 1
    config = DataConfig(
        train_data_dir=str(tmp_path / "given"), resolution=16, caption_column="prompt", validation_fraction=0.4
    )
    train, validation = load_images(config)
    assert train.labels is None
    assert sorted(text for each in (*train.captions, *validation.captions) for text in each) == sorted(
        row["prompt"] for row in rows
    )
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"un\xe9")
    for prompts, message in (
        ("", r"this DAEDiTPipeline draws from texts: give `prompts`"),
        (f"--prompts {tmp_path / 'empty.txt'}", "empty.txt holds no texts. Write one into each line"),
        (f"--prompts {tmp_path / 'latin.txt'}", "latin.txt cannot be read: the byte 0xe9 at 2 is not UTF-8"),
        ("--prompts none.txt", "`prompts` none.txt does not exist"),
        ("--prompts a --class_labels cat", "the pipeline has no classes"),
    ):
        with pytest.raises(UserError, match=message):
            run(sample, prompts, pipeline=tmp_path, output_dir=tmp_path / "refused")


def test_texts_have_a_class_if_the_model_has_classes(encoder, tmp_path):
    parts = dict(zip(("tokenizer", "text_encoder"), load_text_encoder(encoder), strict=True))
    make_pipeline(transformer=make_random_transformer(num_classes=3, cross_attention_dim=16), **parts).save_pretrained(
        tmp_path / "pipeline"
    )
    flags = f"--num_images 4 {STEPS} --prompts red blue"
    run(sample, f"{flags} --class_labels dog cat", pipeline=tmp_path, output_dir=tmp_path / "each")
    rows = rows_of(tmp_path / "each")
    assert [(row["prompt"], row["class_labels"]) for row in rows] == [("red", "dog"), ("blue", "cat")] * 2
    assert rows[0]["file_name"] == "dog/000000.png"
    run(sample, f"{flags} --class_labels dog", pipeline=tmp_path, output_dir=tmp_path / "one")
    assert {row["class_labels"] for row in rows_of(tmp_path / "one")} == {"dog"}
    more = flags.replace("blue", "--class_labels 2 1")
    run(sample, more, pipeline=tmp_path, output_dir=tmp_path / "text")
    assert [(row["prompt"], row["class_labels"]) for row in rows_of(tmp_path / "text")] == [
        ("red", "elk"),
        ("red", "dog"),
    ] * 2
    run(sample, flags, pipeline=tmp_path, output_dir=tmp_path / "none")
    assert "class_labels" not in rows_of(tmp_path / "none")[0] and (tmp_path / "none" / "000003.png").exists()
    with pytest.raises(UserError, match="`class_labels` names 3 classes, but there are 2 texts"):
        run(sample, f"{flags} --class_labels 0 1 2", pipeline=tmp_path, output_dir=tmp_path / "refused")


@pytest.mark.parametrize(
    ("channels", "value_range", "suffix", "atol"),
    [
        (1, [0.0, 65535.0], ".png", 0.5),
        (1, [-1000.0, 3000.0], ".npy", 1e-2),
        (5, [0.0, 1.5], ".npy", 1e-5),
        (4, [0.0, 255.0], ".png", 0.5),
        (4, [0.0, 1.0], ".npy", 1e-5),
    ],
)
def test_numbers_are_stored_in_the_range_of_the_training_images(channels, value_range, suffix, atol, tmp_path):
    pipeline = make_pipeline(channels=channels, value_range=value_range)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    run(sample, f"--num_images 20 {STEPS}", pipeline=tmp_path, output_dir=tmp_path / "samples")
    rows = rows_of(tmp_path / "samples")
    expected = np.stack([drawn_again(pipeline, row, output_type="np") for row in rows[:3]])
    assert rows[0]["file_name"] == f"cat/000000{suffix}" and expected.std() > 0.01 * value_range[1]
    config = DataConfig(
        train_data_dir=str(tmp_path / "samples"), resolution=16, image_channels=channels, value_range=value_range
    )
    train, validation = load_images(config)
    assert train.id2label == NAMES
    for row, values in zip(rows[:3], expected, strict=True):
        path = tmp_path / "samples" / row["file_name"]
        stored = np.load(path) if suffix == ".npy" else np.asarray(Image.open(path)).reshape(16, 16, channels)
        assert stored.dtype == (np.float32 if suffix == ".npy" else np.uint8 if channels == 4 else np.uint16)
        np.testing.assert_allclose(stored, values, atol=atol + 1e-4 * value_range[1])


def test_pipelines_without_classes_fill_one_folder(tmp_path):
    make_pipeline(None, num_classes=None).save_pretrained(tmp_path / "ours")
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "stock")
    LDMPipeline(make_plain_vq_model(), unet, DDIMScheduler()).save_pretrained(tmp_path / "latent")
    for name in ("ours", "stock", "latent"):
        precision = "--mixed_precision bf16" if name == "latent" else ""  # it makes no array of a bfloat16 image
        run(
            sample,
            f"--num_images 3 {STEPS} {precision}",
            pipeline=tmp_path / name,
            output_dir=tmp_path / f"{name}-samples",
        )
        rows = rows_of(tmp_path / f"{name}-samples")
        assert [row["file_name"] for row in rows] == ["000000.png", "000001.png", "000002.png"]
        assert rows[0]["num_inference_steps"] == 2 and "guidance_scale" not in rows[0]
        assert all((tmp_path / f"{name}-samples" / row["file_name"]).exists() for row in rows)
    with pytest.raises(UserError, match="`guidance_scale` changes nothing of what this DAEDiTPipeline draws"):
        run(sample, "--guidance_scale 2", pipeline=tmp_path / "ours", output_dir=tmp_path / "refused")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 1", "`seed` 0"),
        ("--guidance_scale 3 --velocity_scale 1.5", "`guidance_scale` 1.5, `velocity_scale` 1.0"),
        ("--guidance_interval 0 0.5", "`guidance_interval` 0 1"),
        ("--class_labels cat dog", "no `class_labels`"),
        ("--mixed_precision bf16", "`mixed_precision` no"),
    ],
)
def test_images_of_other_settings_are_not_mixed(flags, words, trained, drawn, tmp_path):
    before = files_of(drawn)
    message = f"{drawn} holds images that were drawn with {words}. Draw with the same to add to them, or give another"
    with pytest.raises(UserError, match=message):
        run(sample, f"--num_images 50 {flags}", pipeline=trained, output_dir=drawn)
    assert files_of(drawn) == before


def test_images_of_other_weights_are_not_mixed(drawn, tmp_path):
    pipeline = make_pipeline(default_guidance_scale=1.5, default_num_inference_steps=2)
    torch.nn.init.ones_(pipeline.transformer.proj_out.bias)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="drawn with other weights. Draw with the same"):
        run(sample, "--num_images 50", pipeline=tmp_path, output_dir=drawn)


def test_another_folder_is_left_as_it_is(trained, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    before = files_of(tmp_path / "images")
    with pytest.raises(UserError, match="`output_dir` .*images holds other files, such as cat. Give a new folder"):
        run(sample, "", pipeline=trained, output_dir=tmp_path / "images")
    assert files_of(tmp_path / "images") == before and not (tmp_path / "images" / ".owner").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--class_labels cow", "`class_labels`: `cow` is not one of the 3 classes. Nearest: "),
        ("--class_labels 3", "`class_labels` has 3, but there are 3 classes, 0 to 2"),
        ("--class_labels cat 0", "`class_labels` names a class twice: cat 0. Name each once"),
        ("--prompts red", "`prompts` is given, but this DAEDiTPipeline takes no text: leave it out"),
        ("--top_k 3", "`top_k` changes nothing of what this DAEDiTPipeline draws: leave it out"),
    ],
)
def test_what_the_pipeline_does_not_know_is_refused(flags, message, trained, tmp_path):
    with pytest.raises(UserError, match=message):
        run(sample, flags, pipeline=trained, output_dir=tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("levels", "message"), [([0.8, 0.0], "the lower one first"), ([0, 1, 0, 1], "must be two noise levels")]
)
def test_interval_of_guidance_is_two_noise_levels(levels, message):
    with pytest.raises(ConfigError, match=f"`guidance_interval` is .*, but must be .*{message}|{message}"):
        OneSettingConfig(guidance_interval=levels)


def test_conditions_are_left_to_python(tmp_path):
    transformer = make_random_transformer(num_classes=3, num_continuous=1)
    conditions = {"angle": {"mean": 0.0, "std": 1.0, "low": -1.0, "high": 1.0}}
    make_pipeline(transformer=transformer, conditions=conditions).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"draws from angle too, .* Draw in Python: `pipe\(conditions="):
        run(sample, "", pipeline=tmp_path, output_dir=tmp_path / "samples")


def test_pipeline_is_the_first_word(trained, tmp_path, capsys):
    config = parse_config(SampleConfig, with_flags("sample", [str(trained), "--num_images", "3"]))
    assert (config.samples.pipeline, config.samples.num_images) == (str(trained), 3)
    assert sample.find_pipeline(str(trained)) == sample.find_pipeline(str(trained / "pipeline"))
    assert sample.find_pipeline("user/name") == "user/name"
    with pytest.raises(UserError, match="holds no pipeline: neither model_index.json nor pipeline/model_index.json"):
        sample.find_pipeline(str(tmp_path))
    with pytest.raises(SystemExit):
        parse_config(SampleConfig, with_flags("sample", ["--num_images", "3"]))
    assert "required: --pipeline. They come first: " in capsys.readouterr().err


def test_damaged_settings_are_named(trained, tmp_path):
    for text in ("seed: [", "- 1"):
        (tmp_path / SETTINGS).write_text(text)
        with pytest.raises(UserError, match=f"{SETTINGS} is damaged"):
            run(sample, "", pipeline=trained, output_dir=tmp_path)
