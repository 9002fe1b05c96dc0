"""The training scripts, as a user runs them, on tiny models: they end with what they promise, however interrupted."""

import json
import math
import re
import shutil
import signal
import time
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from models import make_autoencoder, save_backbone
from PIL import Image
from safetensors.torch import load_file
from scripts import (
    BARE_DAE,
    CONFIG_CLASSES,
    DIVERGED_AT_VALIDATION,
    DIVERGING,
    TINY_DAE,
    TINY_DIT,
    TRANSFORMER,
    assert_same_weights,
    in_both_processes,
    launch,
    log_of,
    resume,
    run,
    succeed,
    weights,
)

from dae_diffusers import DAEAutoencoderKL, DAEDiTPipeline
from dae_diffusers.autoencoders.settings import AuxiliaryDecoderType, StageConfig
from dae_diffusers.cli import parse_config
from dae_diffusers.compared_runs.reading import read_runs
from dae_diffusers.compared_runs.tables import write_tables
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.engine import loop
from dae_diffusers.engine.log import RunLog, read_log
from dae_diffusers.engine.settings import steps_of
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.plots import image_grid
from dae_diffusers.settings import compose, flat
from dae_diffusers.training import cache_latents, train_dae, train_dit, train_vqgan_prior
from dae_diffusers.training.settings import TrainDAEConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder):
    """A finished autoencoder and transformer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run")
    run(train_dae, TINY_DAE, curves=True, train_data_dir=image_folder, output_dir=folder)
    run(train_dit, TINY_DIT, curves=True, train_data_dir=image_folder, output_dir=folder, vae=folder / "vae")
    return folder


def test_result_is_a_plain_autoencoder_with_statistics(trained):
    config = json.loads((trained / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    assert not any(name.startswith("auxiliary") for name in config)
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 3 and config["scaling_factor"] == 1.0
    vae = AutoencoderKL.from_pretrained(trained / "vae")
    assert not any(name.startswith("auxiliary") for name in vae.state_dict())


def test_encoder_of_the_result_is_that_of_stage_one(trained):
    stage1, final = weights(trained / "stage1"), weights(trained / "vae")
    for name in final:
        if name.split(".")[0] in ("encoder", "quant_conv"):
            assert torch.equal(stage1[name], final[name])


def test_run_leaves_logs_curves_and_grids(trained):
    for script, grid in (("train_dae", "reconstruction-stage2-00000008.png"), ("train_dit", "samples-00000006.png")):
        assert (trained / script / "curves.png").stat().st_size > 1000
        assert (trained / script / "grids" / grid).exists()
        rows = log_of(trained, script)
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
        assert {"train/learning_rate", "train/gradient_norm"} <= rows[0].keys()
    assert any("validation/loss" in row for row in rows)


def test_what_a_run_records_is_compared_with_its_copy(trained, tmp_path):
    """Also in a run as an earlier version has left it: then steps and inputs come from the checkpoints."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    for script in ("train_dae", "train_dit"):
        record = json.loads((copy / script / "run.json").read_text())
        for name in ("steps", "inputs"):
            del record[name]
        (copy / script / "run.json").write_text(json.dumps(record))
    compared = read_runs([trained, copy])[0]
    first, second = ({name: each.record for name, each in run.scripts.items()} for run in compared)
    for script, steps in (("train_dae", 8), ("train_dit", 6)):
        assert compared[1].scripts[script].steps_planned == compared[0].scripts[script].steps_done == steps
        assert second[script] == first[script]
    text = write_tables(compared, [])
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = {name: values for _, name, *values in cells}
    assert text.count("None: all settings are the same.") == 2 and "Not comparable" not in text
    assert rows["steps"][:2] == ["6 of 6"] * 2 and "second" in rows["training time"][0]
    assert {"psnr ↑, last", "l1 ↓, best", "loss ↓, best", "parameters", "seconds a step"} <= rows.keys()


def test_grid_shows_held_out_images_of_every_class(trained, image_folder):
    _, held_out = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))
    chosen = held_out.spread(10)
    assert {held_out.labels[n] for n in chosen} == set(held_out.labels)
    originals = np.asarray(image_grid(torch.stack([held_out[n]["pixel_values"] for n in chosen]), columns=len(chosen)))
    height, width, _ = originals.shape
    with Image.open(trained / "train_dae" / "grids" / "reconstruction-stage2-00000008.png") as grid:
        pixels = np.asarray(grid)[-2 * height - 2 :, -width:]  # the names are left and above
    assert np.array_equal(pixels[:height], originals) and grid.height > 2 * height + 2


def test_pipeline_draws_images_by_class_name(trained):
    pipeline = DAEDiTPipeline.from_pretrained(trained / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=["cat", 1], num_inference_steps=2).images
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.parametrize("step", [3, 4, 6, 8])
def test_resumed_autoencoder_equals_an_uninterrupted_one(trained, image_folder, tmp_path, step):
    resume(train_dae, TINY_DAE, trained, tmp_path / "run", step, ("vae", "stage1"), train_data_dir=image_folder)
    assert_same_weights(weights(trained / "vae"), weights(tmp_path / "run" / "vae"))
    for file in ("vae/config.json", "train_dae/log.jsonl"):
        expected, resumed = ((folder / file).read_text() for folder in (trained, tmp_path / "run"))
        assert expected.replace(str(trained), "") == resumed.replace(str(tmp_path / "run"), "")


def test_resumed_transformer_equals_an_uninterrupted_one(trained, image_folder, tmp_path):
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    resume(train_dit, TINY_DIT, trained, tmp_path / "run", 3, ("pipeline",), **data)
    transformers = [weights(folder / "pipeline" / "transformer") for folder in (trained, tmp_path / "run")]
    assert_same_weights(*transformers)
    logs = [(folder / "train_dit" / "log.jsonl").read_text() for folder in (trained, tmp_path / "run")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("script", "change", "message"),
    [
        (
            train_dae,
            "--auxiliary_decoder none",
            "was trained with `auxiliary_decoder` dropout, but now it is none",
        ),
        (train_dae, "--auxiliary_dropout 0.5", "was trained with `auxiliary_dropout` 0.3, but now it is 0.5"),
        (train_dae, "--stage1_steps 6", "finished the stage of `stage1_steps` 4, but now it is 6"),
        (train_dae, "--stage1_steps 2", "finished the stage of `stage1_steps` 4, but now it is 2"),
        (train_dae, "--stage2_steps 3", "4 of them of `stage2_steps`, but now `stage2_steps` is 3. Give at least 4"),
        (train_dae, "--stage 1", "8 of them of `stage1_steps`, but now `stage1_steps` is 4"),
        (
            train_dae,
            "--stage 2 --stage1_dir {run}",
            "began with `stage1_steps`, but this run begins with `stage2_steps`",
        ),
        (train_dae, "--norm_num_groups 8", "was trained with `norm_num_groups` 4, but now it is 8"),
        (train_dae, "--resolution 32", "was trained with `resolution` 16, but now it is 32. Continue with 16"),
        (train_dit, "--resolution 16 32", "was trained with `resolution` 16, but now it is 16 32"),
        (train_dit, "--max_train_steps 3", "has done 6 steps, 6 of them of `max_train_steps`, but now"),
        (train_dit, "--num_layers 1", "was trained with `num_layers` 2, but now it is 1"),
        (
            train_dit,
            "--distill_guidance_scale 2 --pretrained_model_name_or_path x",
            "trained without `pretrained_model_name_or_path`, but now it is x",
        ),
        (
            train_dit,
            "--pretrained_model_name_or_path x",
            "trained without `pretrained_model_name_or_path`, but now it is x",
        ),
    ],
)
def test_plan_that_contradicts_the_checkpoint_is_refused_and_nothing_is_written(
    trained, image_folder, script, change, message
):
    flags = (
        (TINY_DAE if script is train_dae else f"{TINY_DIT} --vae {trained / 'vae'}") + " " + change.format(run=trained)
    )
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=re.escape(message)):
        run(script, flags, train_data_dir=image_folder, output_dir=trained, resume_from_checkpoint="latest")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", get_args(AuxiliaryDecoderType))
def test_plan_holds_exactly_what_shapes_the_auxiliary_decoder_of_this_kind(kind):
    changes = {"auxiliary_dropout": 0.6, "auxiliary_channel_multiplier": 0.5, "auxiliary_layers_per_block": 1}
    plan = StageConfig(auxiliary_decoder=kind).plan()
    for name, value in changes.items():
        decoders = [
            make_autoencoder(kind, layers_per_block=2, block_out_channels=(16, 16), **more).auxiliary_decoder
            for more in ({}, {name: value})
        ]
        assert (name in plan) == (str(decoders[0]) != str(decoders[1])), name
    assert plan["auxiliary_decoder"] == kind
    if kind != "none":
        assert StageConfig(stage="2", auxiliary_decoder=kind).plan() == {
            "keep_latent_channels": None
        }  # stage 1 has made it


def test_epochs_are_passes_over_the_images_whatever_the_batch():
    assert steps_of(10, None, 100, 8) == 10
    assert steps_of(10, 2.0, 100, 8) == 25
    assert steps_of(10, 0.01, 100, 8) == 1
    with pytest.raises(ConfigError, match="does not go with `streaming`"):
        steps_of(10, 1.0, None, 8)
    stages = compose(TrainDAEConfig, dataset_name="digits", stage1_steps=200, stage2_steps=100).stages
    assert stages.stage_steps() == {1: 200, 2: 100} and stages.stage_steps(30) == {1: 20, 2: 10}


def test_run_of_epochs_is_the_run_of_as_many_steps(trained, image_folder, tmp_path, caplog):
    # 23 training images in batches of 4: a pass has 6 steps, rounded.
    options = {"train_data_dir": image_folder, "vae": trained / "vae", "output_dir": tmp_path, "num_train_epochs": 1}
    flags = TINY_DIT.replace("--max_train_steps 6", "")
    run(train_dit, flags, **options)
    assert_same_weights(load_file(trained / TRANSFORMER), load_file(tmp_path / TRANSFORMER))
    with pytest.raises(
        UserError, match="Leave out `num_train_epochs` 0.5, which says so, and give `max_train_steps` of at"
    ):
        run(train_dit, flags, resume_from_checkpoint="latest", **{**options, "num_train_epochs": 0.5})
    # With other images in a step, the steps that are left would be other passes; the same number of them goes on.
    shutil.rmtree(tmp_path / "pipeline")
    checkpoints = tmp_path / "train_dit" / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-00000006")
    options |= {"resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="with 4 images in a step, but now they are 2, .*they were `max_train_steps 6`"):
        run(train_dit, f"{flags} --train_batch_size 2", **options)
    run(train_dit, f"{flags} --train_batch_size 2 --gradient_accumulation_steps 2 --timestep_shift 2", **options)
    for text in ("`train_batch_size` 2 (was 4)", "`timestep_shift` 2.0 (was None)"):
        assert text in next(each for each in caplog.messages if "other settings hold than before" in each)
    assert (tmp_path / TRANSFORMER).exists() and len(list(checkpoints.iterdir())) == 2


def test_flag_wins_over_the_launchers_number_of_microbatches(trained, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")  # as some files of `accelerate launch` set it
    run(train_dit, TINY_DIT, train_data_dir=image_folder, vae=trained / "vae", output_dir=tmp_path)
    assert_same_weights(load_file(trained / TRANSFORMER), load_file(tmp_path / TRANSFORMER))


def test_finished_run_goes_on_with_more_steps_by_the_schedule_of_the_new_length(trained, image_folder, tmp_path):
    flags = TINY_DIT.replace("--max_train_steps 6", "--max_train_steps 9")
    options = {"train_data_dir": image_folder, "vae": trained / "vae"}
    resume(train_dit, flags, trained, tmp_path / "longer", 6, ("pipeline",), **options)
    run(train_dit, flags, output_dir=tmp_path / "whole", **options)
    rates = [
        {row["step"]: row["train/learning_rate"] for row in log_of(folder, "train_dit") if "train/learning_rate" in row}
        for folder in (tmp_path / "longer", tmp_path / "whole")
    ]
    assert {step: rate for step, rate in rates[0].items() if step > 6} == {
        step: rate for step, rate in rates[1].items() if step > 6
    }
    assert max(rates[0]) == 9


@pytest.mark.parametrize("script", ["train_dae", "train_dit"])
def test_learning_rate_may_be_changed_on_resuming(trained, image_folder, tmp_path, script):
    module, flags, results = {
        "train_dae": (train_dae, TINY_DAE, ("vae", "stage1")),
        "train_dit": (train_dit, TINY_DIT, ("pipeline",)),
    }[script]
    vae = {} if script == "train_dae" else {"vae": trained / "vae"}
    argv = f"{flags} --train_data_dir x".split() + [word for name in vae for word in (f"--{name}", "x")]
    rate = flat(parse_config(CONFIG_CLASSES[module], argv))["learning_rate"] / 2
    more = {"train_data_dir": image_folder, "learning_rate": rate, **vae}
    resume(module, flags, trained, tmp_path / "run", 3, results, **more)
    before, after = (
        {row["step"]: row["train/learning_rate"] for row in log_of(folder, script) if "train/learning_rate" in row}
        for folder in (trained, tmp_path / "run")
    )
    assert after == {step: value if step <= 3 else value / 2 for step, value in before.items()}
    assert any(value > 0 for step, value in after.items() if step > 3)


def test_second_stage_alone_equals_both_in_one_run(trained, image_folder, tmp_path):
    # The second stage of a whole run begins at another micro-batch, so only its frozen half can be equal.
    run(train_dae, TINY_DAE + " --stage 1", train_data_dir=image_folder, output_dir=tmp_path / "one")
    assert_same_weights(weights(trained / "stage1"), weights(tmp_path / "one" / "stage1"))
    assert not (tmp_path / "one" / "vae").exists()
    run(
        train_dae,
        TINY_DAE + " --stage 2",
        train_data_dir=image_folder,
        output_dir=tmp_path / "two",
        stage1_dir=tmp_path / "one",
    )
    both, alone = AutoencoderKL.from_pretrained(trained / "vae"), AutoencoderKL.from_pretrained(tmp_path / "two/vae")
    assert both.config.latents_mean == alone.config.latents_mean
    assert_same_weights(both.encoder.state_dict(), alone.encoder.state_dict())


def test_accumulated_batches_equal_one_large_batch(image_folder, tmp_path):
    # Without dropout and draws the split of a batch cannot be seen; what is left is rounding.
    flags = TINY_DAE + " --auxiliary_decoder same --kl_weight 0 --stage1_steps 2 --stage2_steps 2 --random_flip"
    for name, batch in (("whole", "--train_batch_size 8"), ("halves", "--train_batch_size 4")):
        more = " --gradient_accumulation_steps 2" if name == "halves" else ""
        run(train_dae, f"{flags} {batch}{more}", train_data_dir=image_folder, output_dir=tmp_path / name)
    rows = {}
    for name in ("whole", "halves"):
        lines = (tmp_path / name / "train_dae" / "log.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    for whole, halves in zip(rows["whole"], rows["halves"], strict=True):
        assert whole["step"] == halves["step"]
        assert abs(whole.get("train/learning_rate", 0) - halves.get("train/learning_rate", 0)) < 1e-12


def test_resumed_run_may_accumulate_otherwise(trained, image_folder, tmp_path, monkeypatch):
    seen, seed_microbatch = [], loop.seed_microbatch
    monkeypatch.setattr(
        loop, "seed_microbatch", lambda seed, number: (seen.append(number), seed_microbatch(seed, number))
    )
    flags = BARE_DAE + " --stage 1 --checkpointing_steps 1"
    for more in (
        " --stage1_steps 3",
        " --stage1_steps 5 --gradient_accumulation_steps 2 --resume_from_checkpoint latest",
    ):
        run(train_dae, flags + more, train_data_dir=image_folder, output_dir=tmp_path)
    assert len(seen) == 3 + 2 * 2  # whole steps, also the first after the checkpoint


def test_two_processes_equal_one_that_accumulates(image_folder, tmp_path):
    one = launch(
        "train_dae",
        TINY_DAE + " --gradient_accumulation_steps 2",
        train_data_dir=image_folder,
        output_dir=tmp_path / "1",
    )
    succeed(one)
    two = launch("train_dae", TINY_DAE, processes=2, train_data_dir=image_folder, output_dir=tmp_path / "2")
    succeed(two)
    first, second = (weights(tmp_path / name / "vae") for name in "12")
    assert_same_weights(first, second, rtol=1e-3, atol=1e-4)
    configs = [json.loads((tmp_path / name / "vae" / "config.json").read_text()) for name in "12"]
    torch.testing.assert_close(
        torch.tensor(configs[0]["latents_std"]), torch.tensor(configs[1]["latents_std"]), rtol=1e-3, atol=0
    )


def test_sigterm_saves_exits_with_143_and_the_run_goes_on_identically(trained, image_folder, tmp_path):
    flags = TINY_DAE.replace("--checkpointing_steps 3", "--checkpointing_steps 1000")
    process = launch("train_dae", flags, train_data_dir=image_folder, output_dir=tmp_path)
    log = tmp_path / "train_dae" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143, output
    assert list((tmp_path / "train_dae" / "checkpoints").glob("checkpoint-*")), output
    again = launch(
        "train_dae", flags, train_data_dir=image_folder, output_dir=tmp_path, resume_from_checkpoint="latest"
    )
    succeed(again)
    assert_same_weights(weights(trained / "vae"), weights(tmp_path / "vae"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "same", "narrow", "shallow", "linear"])
def test_every_auxiliary_decoder_trains(kind, image_folder, tmp_path):
    flags = TINY_DAE + f" --stage1_steps 1 --stage2_steps 1 --auxiliary_decoder {kind}"
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path)
    steps = [row["step"] for row in log_of(tmp_path)]
    assert max(steps) == 2
    assert (tmp_path / "stage1").exists() == (kind != "none")
    AutoencoderKL.from_pretrained(tmp_path / "vae")


def test_warm_started_decoder_begins_better(image_folder, tmp_path):
    flags = (
        TINY_DAE + " --stage1_steps 30 --stage2_steps 1 --learning_rate 1e-2 --lr_warmup_steps 0 --validation_steps 99"
    )
    values = {}
    for name, more in (("cold", " --no_warm_start_decoder"), ("warm", "")):
        run(train_dae, flags + more, train_data_dir=image_folder, output_dir=tmp_path / name)
        rows = log_of(tmp_path / name)
        values[name] = rows[-2]["train/reconstruction_loss"]  # of the only step of stage 2
    assert values["warm"] < values["cold"]


def test_mixed_precision_keeps_float32_weights(image_folder, tmp_path):
    flags = TINY_DAE + " --stage1_steps 1 --stage2_steps 1 --mixed_precision bf16 --gradient_checkpointing"
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path)
    assert {value.dtype for value in weights(tmp_path / "vae").values()} == {torch.float32}


def test_cached_latents_train_the_same_transformer_as_images(trained, image_folder, tmp_path):
    data = {"train_data_dir": image_folder, "vae": trained / "vae"}
    run(cache_latents, "--resolution 16 --dtype float32 --random_flip", output_dir=tmp_path / "cache", **data)
    run(train_dit, TINY_DIT + " --random_flip", output_dir=tmp_path / "images", **data)
    run(train_dit, TINY_DIT, output_dir=tmp_path / "cached", vae=trained / "vae", latent_cache=tmp_path / "cache")
    first, second = (weights(tmp_path / name / "pipeline" / "transformer") for name in ("images", "cached"))
    assert_same_weights(first, second, rtol=1e-3, atol=1e-4)


def test_flat_folder_trains_an_unconditional_pipeline(trained, image_folder, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in image_folder.rglob("*.png"):
        shutil.copy(path, tmp_path / "flat")
    run(train_dit, TINY_DIT, train_data_dir=tmp_path / "flat", output_dir=tmp_path / "run", vae=trained / "vae")
    pipeline = DAEDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.num_classes is None
    assert len(pipeline(num_images_per_label=3, num_inference_steps=2).images) == 3


@pytest.mark.parametrize(("class_dropout_prob", "guidance_scale"), [(0, 1), (0.5, 2)])
def test_grid_is_guided_only_by_a_model_that_learnt_to_do_without_the_class(
    trained, image_folder, tmp_path, monkeypatch, class_dropout_prob, guidance_scale
):
    scales = []
    draw = DAEDiTPipeline.__call__
    monkeypatch.setattr(
        DAEDiTPipeline,
        "__call__",
        lambda *args, **kwargs: scales.append(kwargs["guidance_scale"]) or draw(*args, **kwargs),
    )
    flags = {"vae": trained / "vae", "train_data_dir": image_folder, "output_dir": tmp_path, "max_train_steps": 1}
    run(train_dit, TINY_DIT, class_dropout_prob=class_dropout_prob, **flags)
    assert set(scales) == {guidance_scale}


def test_published_autoencoder_stays_as_it_is_and_gets_statistics(trained, image_folder, tmp_path):
    """As Stable Diffusion's come: no statistics, a factor, a shift, and the side of the images that it has seen."""
    vae = AutoencoderKL.from_pretrained(trained / "vae")
    published = {"scaling_factor": 0.18215, "shift_factor": 0.2, "sample_size": 512}
    vae.register_to_config(latents_mean=None, latents_std=None, **published)
    vae.save_pretrained(tmp_path / "vae")
    flags = TINY_DIT + " --resolution 16"
    run(train_dit, flags, train_data_dir=image_folder, output_dir=tmp_path, vae=tmp_path / "vae")
    pipeline = DAEDiTPipeline.from_pretrained(tmp_path / "pipeline")
    for name, weight in weights(tmp_path / "vae").items():
        assert torch.equal(weight, pipeline.vae.state_dict()[name])
    assert pipeline(num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
    with_statistics = pipeline.vae.config
    assert with_statistics.shift_factor is None
    expected = AutoencoderKL.from_pretrained(trained / "vae").config
    torch.testing.assert_close(torch.tensor(with_statistics.latents_std), torch.tensor(expected.latents_std))
    assert with_statistics.scaling_factor == 1.0

    data = {"train_data_dir": image_folder, "vae": tmp_path / "vae"}
    run(cache_latents, "--resolution 16 --dtype float32", output_dir=tmp_path / "cache", **data)
    cached = {"vae": tmp_path / "vae", "latent_cache": tmp_path / "cache"}
    run(train_dit, TINY_DIT, output_dir=tmp_path / "cached", **cached)
    of_cache = DAEDiTPipeline.from_pretrained(tmp_path / "cached" / "pipeline").vae.config
    torch.testing.assert_close(torch.tensor(of_cache.latents_std), torch.tensor(expected.latents_std))


def test_tracker_gets_scalars_and_pictures(image_folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = TINY_DAE + " --stage1_steps 2 --stage2_steps 2 --report_to tensorboard"
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path)
    tags = {"images": set(), "scalars": set()}
    for path in (tmp_path / "train_dae").rglob("events.out.tfevents*"):
        events = accumulator.EventAccumulator(str(path)).Reload()
        for kind in tags:
            tags[kind] |= set(events.Tags()[kind])
    assert {"train/reconstruction_loss", "train/kl_loss", "validation/psnr"} <= tags["scalars"]
    assert any("reconstruction-stage" in tag for tag in tags["images"])


def test_failing_tracker_stops_neither_training_nor_the_others(tmp_path, caplog):
    class Tracker:
        def __init__(self, name):
            self.name, self.calls = name, []

        def log(self, values, step):
            self.calls.append(step)
            if self.name == "bad":
                raise ConnectionError("the tracker's server is gone")

        def finish(self):
            self.calls.append("finish")

    bad, good = Tracker("bad"), Tracker("good")
    accelerator = Accelerator()
    accelerator.trackers = [bad, good]
    log = RunLog(accelerator, tmp_path, "title")
    for step in (1, 2):
        log.write({"loss": 1.0}, step)
    log.finish()
    assert (bad.calls, good.calls) == ([1], [1, 2, "finish"])
    assert caplog.text.count("the tracker bad failed (ConnectionError: the tracker's server is gone)") == 1


def test_means_of_two_processes_leave_out_what_is_not_finite_and_go_on_bit_by_bit(tmp_path):
    def action():
        accelerator = Accelerator()
        log, resumed = (RunLog(accelerator, tmp_path, "title", skips_nonfinite=True) for _ in range(2))
        first, then = ((2.0, 1e-7), 0.3) if accelerator.is_main_process else ((math.nan, 9.0), 0.7)
        for loss in first:
            log.add(loss=torch.tensor(loss), never=torch.tensor(math.nan))
        resumed.load_state(log.state()["log_sums"])
        RunLog(accelerator, tmp_path, "title").load_state({"loss": 3.5}, {"loss": 2})  # of an earlier version
        for each in (log, resumed):
            each.add(loss=torch.tensor(then))
            each.write_means(1)

    code, text = in_both_processes(action)
    assert code == 0, text
    before, after = read_log(tmp_path)
    assert before == after and before["train/loss"] == pytest.approx((2.0 + 1e-7 + 0.3 + 9.0 + 0.7) / 5)
    assert "train/never" not in before


def test_exploding_loss_stops_before_the_update_and_keeps_the_checkpoint(image_folder, tmp_path):
    flags = TINY_DAE + " --learning_rate 1e30 --lr_scheduler constant --max_grad_norm 1e30"
    with pytest.raises(UserError, match="at step"):
        run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path)
    assert not (tmp_path / "vae").exists()
    for path in (tmp_path / "train_dae" / "checkpoints").glob("*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (train_dae, TINY_DAE + " --train_data_dir {images} --output_dir {trained}", "holds another run"),
        (train_dae, TINY_DAE + " --train_data_dir {images} --output_dir {file}/x", "cannot be written"),
        (
            train_dae,
            TINY_DAE + " --stage 2 --stage1_dir {empty} --train_data_dir {images} --output_dir {new}",
            "no stage-1 autoencoder",
        ),
        (
            train_dae,
            TINY_DAE + " --train_data_dir {images} --output_dir {new} --resume_from_checkpoint {empty}",
            "checkpoint.json",
        ),
        (train_dit, TINY_DIT + " --train_data_dir {images} --output_dir {new} --vae {empty}", "not an autoencoder"),
        (train_dit, TINY_DIT + " --train_data_dir {images} --output_dir {new} --vae {damaged}", "not an autoencoder"),
        (
            train_dit,
            TINY_DIT + " --train_data_dir {images} --output_dir {new} --vae {trained}/vae --image_channels 1",
            "3 image channels",
        ),
        (
            train_dit,
            TINY_DIT + " --train_data_dir {images} --output_dir {new} --vae {trained}/vae --resolution 18",
            "nearest valid ones are 16 and 20",
        ),
        (train_dit, TINY_DIT + " --output_dir {new} --vae {trained}/vae --latent_cache {empty}", "no latent cache"),
    ],
)
def test_what_the_user_can_mend_is_answered_with_a_sentence(
    script, flags, message, trained, image_folder, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "file").touch()
    (folder / "empty").mkdir()
    shutil.copytree(trained / "vae", folder / "damaged")
    with (folder / "damaged" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.truncate(100)
    names = {name: folder / name for name in ("file", "empty", "new", "damaged")}
    before = weights(trained / "vae")
    with pytest.raises(UserError, match=message) as error:
        run(script, flags.format(images=image_folder, trained=trained, **names))
    assert "\n" not in str(error.value)
    assert_same_weights(before, weights(trained / "vae"))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (train_dae, "--dataset_name digits --resolution 30", "28 and 32"),
        (train_dae, "--dataset_name digits --auxiliary_decoder dropout --auxiliary_dropout 1", "below 1"),
        (train_dae, "--dataset_name digits --stage 2", "stage1_dir"),
        (train_dae, "--dataset_name digits --norm_num_groups 7", "multiples of"),
        (train_dae, "--dataset_name digits --train_data_dir x", "one of"),
        (
            train_dae,
            "--dataset_name digits --seed 4294967296",
            "`--seed` is 4294967296, but must be in [0, 4294967295]",
        ),
        (
            train_dae,
            "--dataset_name digits --adam_weight_decay -1",
            "`--adam_weight_decay` is -1.0, but must be 0 or more",
        ),
        (train_dae, "--dataset_name digits --value_range 3 3", "value_range"),
        (train_vqgan_prior, "--vae x --dataset_name digits --sample_top_p 0", "`--sample_top_p` is 0.0, but must be"),
        (train_dit, "--vae x --dataset_name digits --model DiT-M/2", "DiT-S"),
        (train_dit, "--vae x --dataset_name digits --class_dropout_prob 1", "label_column none"),
        (train_dit, "--vae x", "one of"),
        (train_dit, "--dataset_name digits", "--vae"),
        (cache_latents, "--vae x --dataset_name digits --random_crop", "do not go with a cache"),
    ],
)
def test_impossible_flags_exit_with_two(script, flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(CONFIG_CLASSES[script], flags.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def cached(tmp_path_factory, image_folder):
    """A run whose second stage is long enough for a cache of latents, mirrored ones included."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("cached")
    run(train_dae, LONG_STAGE_TWO, train_data_dir=image_folder, output_dir=folder)
    return folder


LONG_STAGE_TWO = TINY_DAE + " --stage2_steps 14 --random_flip"


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_cached_latents_change_nothing_in_stage_two(cached, image_folder, tmp_path, kind, monkeypatch):
    more = "" if kind == "kl" else " --autoencoder vq --codebook_size 16 --codebook_warmup_steps 1"
    if kind == "vq":
        cached = tmp_path / "cached"
        run(train_dae, LONG_STAGE_TWO + more, train_data_dir=image_folder, output_dir=cached)
    flags = LONG_STAGE_TWO + more + " --stage2_cache_gib 0"
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path / "encoded")
    assert_same_weights(weights(cached / "vae"), weights(tmp_path / "encoded" / "vae"), rtol=1e-3, atol=1e-5)
    assert not (cached / "train_dae" / "latents").exists()
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (cached, tmp_path / "encoded")]
    for name in ("latents_mean", "latents_std"):
        assert configs[0][name] == pytest.approx(configs[1][name], rel=1e-5, abs=1e-6)


def test_stage_two_encodes_each_view_once(image_folder, tmp_path, monkeypatch):
    """And never again, whatever the losses: the statistics are those of what is cached."""
    encoded = []
    plain, original = AutoencoderKL.encode, DAEAutoencoderKL.encode

    def refuse(self, *args, **kwargs):
        """Of a plain autoencoder; ours ends here too."""
        return plain(self, *args, **kwargs) if isinstance(self, DAEAutoencoderKL) else pytest.fail("encoded once more")

    def count(self, x, *args, **kwargs):
        if self.stage == 2 and not self.training:
            encoded.append(len(x))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "encode", refuse)
    monkeypatch.setattr(DAEAutoencoderKL, "encode", count)
    flags = LONG_STAGE_TWO + " --validation_steps 1000 --validation_fraction 0.25 --adversarial_weight 0.5"
    flags += (
        f" --discriminator_channels 8 --discriminator_layers 2 --perceptual_model {save_backbone(tmp_path, 'resnet')}"
    )
    run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path)
    rows = len(list(image_folder.rglob("*.png")))
    held_out = round(0.25 * rows)
    assert sum(encoded) == 2 * (rows - held_out) + held_out  # and one validation


@pytest.mark.parametrize("step", [6, 15])
def test_resume_with_cached_latents_equals_an_uninterrupted_run(cached, image_folder, tmp_path, step):
    resume(train_dae, LONG_STAGE_TWO, cached, tmp_path / "run", step, ("vae",), train_data_dir=image_folder)
    assert_same_weights(weights(cached / "vae"), weights(tmp_path / "run" / "vae"))


@pytest.mark.parametrize("left", ["of another encoder", "damaged"])
def test_latents_that_a_killed_run_has_left_are_replaced(cached, image_folder, tmp_path, left):
    latents = tmp_path / "train_dae" / "latents"
    options = {"train_data_dir": image_folder, "vae": cached / "vae", "output_dir": tmp_path / "other"}
    run(cache_latents, "--resolution 16 --dtype float32", **options)
    shutil.copytree(tmp_path / "other" / "train", latents)
    if left == "damaged":
        (latents / "manifest.json").write_text("[")
    run(train_dae, LONG_STAGE_TWO, train_data_dir=image_folder, output_dir=tmp_path)
    assert_same_weights(weights(cached / "vae"), weights(tmp_path / "vae"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the tracer
@pytest.mark.parametrize("more", ["", " --adversarial_weight 0.5 --discriminator_channels 8 --discriminator_layers 2"])
def test_compiled_networks_train_as_others_do(trained, image_folder, tmp_path, monkeypatch, fresh_compiler, more):
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_eagerly(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")  # traces and differentiates as for a GPU, without generating code

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    run(train_dae, TINY_DAE + " --compile" + more, train_data_dir=image_folder, output_dir=tmp_path)
    assert compiled == ["Encoder", "AuxiliaryDecoder", "Decoder"]
    if not more:
        assert_same_weights(weights(trained / "vae"), weights(tmp_path / "vae"), rtol=1e-3, atol=1e-4)
        run(train_dit, TINY_DIT + " --compile", train_data_dir=image_folder, output_dir=tmp_path, vae=trained / "vae")
        transformers = [weights(folder / "pipeline" / "transformer") for folder in (trained, tmp_path)]
        assert_same_weights(*transformers, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rate", "message"), DIVERGED_AT_VALIDATION)
def test_divergence_that_a_validation_meets_first_says_what_to_do(rate, message, image_folder, tmp_path):
    flags = (
        BARE_DAE.replace("--validation_steps 9", "--validation_steps 1")
        + f" --lr_warmup_steps 0 --learning_rate {rate}"
    )
    with pytest.raises(UserError, match=message):
        run(train_dae, flags, train_data_dir=image_folder, output_dir=tmp_path)


@pytest.mark.parametrize(("script", "limit"), [(train_dit, 1), (train_dit, 2), (train_dae, 1)])
def test_weights_that_diverge_are_neither_saved_nor_exported(script, limit, trained, image_folder, tmp_path):
    flags = TINY_DAE if script is train_dae else f"{TINY_DIT} --vae {trained / 'vae'}"
    flags = flags.replace("--checkpoints_total_limit 9", f"--checkpoints_total_limit {limit}")
    with pytest.raises(UserError, match="NaN or infinite|became|not finite"):
        run(script, flags + DIVERGING, train_data_dir=image_folder, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "pipeline").exists() and not (tmp_path / "run" / "vae").exists()
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path


@pytest.mark.parametrize(("channels", "said"), [(11, False), (12, True), (16, True)])
def test_latents_with_as_many_numbers_as_the_images_are_named(channels, said, caplog):
    train_dit.warn_of_large_latents(DataConfig(dataset_name="digits", resolution=16), channels, (8, 8))
    assert ("give `--timestep_shift` 2" in caplog.text) == said


def test_a_resumed_run_goes_on_in_its_chart(image_folder, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda _, *args, **kwargs: begun.append((args, kwargs)))
    for step in (0, 5, 0):
        log = RunLog(Accelerator(), tmp_path, "title")
        log.accelerator.log_with = ["a tracker"]
        log.begin(step, "project", "name", {"decoder": "[8, 8]"})
    ids = [kwargs["init_kwargs"]["wandb"]["id"] for _, kwargs in begun]
    assert ids[0] == ids[1] != ids[2]
    assert all(args == ("project",) and kwargs["config"] == {"decoder": "[8, 8]"} for args, kwargs in begun)


def test_a_pipeline_of_an_earlier_step_leaves_the_run_as_it_is(trained, image_folder, tmp_path):
    inputs = {"train_data_dir": image_folder, "vae": trained / "vae"}
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    checkpoint = min((trained / "train_dit" / "checkpoints").glob("checkpoint-*"))
    step = int(checkpoint.name.rpartition("-")[2])
    flags = {"output_dir": tmp_path / "earlier", "resume_from_checkpoint": checkpoint, "max_train_steps": step}
    run(train_dit, TINY_DIT, **inputs, **flags)
    assert {path: path.read_bytes() for path in before} == before
    made, averaged = load_file(tmp_path / "earlier" / TRANSFORMER), load_file(checkpoint / "ema.safetensors")
    assert {value.sum().item() for value in averaged.values()} <= {value.sum().item() for value in made.values()}
