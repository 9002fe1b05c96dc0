"""The command that makes averages of chosen lengths: pipelines, a comparison, and the best one in the run's pipeline."""

import json
import os
import shutil

import pytest
import torch
from models import make_plain_vq_model, save_autoencoder, save_backbone
from safetensors.torch import load_file, save_file
from scripts import PRIOR, TINY_DIT, TINY_PRIOR, TRANSFORMER, assert_same_weights, run, weights
from torch.testing import assert_close

from dae_diffusers import DAEDiTPipeline, DAEVQGANPipeline
from dae_diffusers.cli import parse_config
from dae_diffusers.engine.post_hoc_ema.choosing import put_into_pipeline
from dae_diffusers.engine.post_hoc_ema.snapshots import find_snapshots, snapshots_folder
from dae_diffusers.errors import UserError
from dae_diffusers.hub.card import make_card
from dae_diffusers.hub.results import read_result
from dae_diffusers.training import ema, train_dit, train_vqgan_prior
from dae_diffusers.training.settings import EMAConfig, with_flags

KEEP = " --post_hoc_ema --post_hoc_ema_steps 1 --learning_rate 0.02 --lr_warmup_steps 0"
DRAW = "--resolution 16 --validation_fraction 0.5 --num_images 12 --num_inference_steps 1"


@pytest.fixture(scope="module")
def images(image_folder):
    return {"train_data_dir": image_folder}


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    vae = save_autoencoder(folder / "given_vae")
    run(train_dit, TINY_DIT + KEEP, output_dir=folder / "run", vae=vae, **images)
    return folder / "run"


@pytest.fixture
def trained(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def last_snapshot(folder, script="train_dit"):
    files = find_snapshots(snapshots_folder(folder / script))
    return load_file(files[max(files)])


def test_each_length_becomes_a_pipeline(trained):
    before = (trained / TRANSFORMER).read_bytes()
    run(ema, "--length 0.05 0.07 0.1", folder=trained)
    assert (trained / TRANSFORMER).read_bytes() == before
    stored, made = last_snapshot(trained), {}
    for length in ("0.05", "0.07", "0.1"):
        made[length] = weights(trained / "ema" / f"length-{length}" / "transformer")
    for length in ("0.05", "0.1"):
        for name, value in made[length].items():
            assert_close(value, stored[f"{length}/{name}"].float(), atol=1e-5, rtol=0)
    assert any(not torch.equal(made["0.05"][name], made["0.07"][name]) for name in made["0.05"])
    pipeline = DAEDiTPipeline.from_pretrained(trained / "ema" / "length-0.07")
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline("cat", num_inference_steps=1).images) == 1


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
@pytest.mark.parametrize("best", [None, 0.1])
def test_best_length_is_put_into_the_pipeline(best, trained, images, tmp_path, monkeypatch):
    before, measure = load_file(trained / TRANSFORMER), ema.measure

    def with_best(*args):
        rows = measure(*args)
        for row in rows:
            row["gfd_judge"] += 100 * ((row["length"], row["guidance_scale"]) != (best, 3))
        return rows

    monkeypatch.setattr(ema, "measure", with_best)
    judge = save_backbone(tmp_path / "judge", "classifier")
    flags = f"{DRAW} --length 0.05 0.1 --guidance_scales 1 3 --set_defaults --output_dir {tmp_path / 'out'}"
    run(ema, flags, folder=trained, features=judge, **images)
    rows = json.loads((tmp_path / "out" / "ema.json").read_text())["rows"]
    assert [(row["length"], row["guidance_scale"]) for row in rows] == [
        (length, scale) for length in (None, 0.05, 0.1) for scale in (1, 3)
    ]
    assert len(list((tmp_path / "out" / "samples").iterdir())) == len(rows)  # each was drawn with weights of its own
    assert json.loads((trained / "pipeline" / "model_index.json").read_text())["default_guidance_scale"] == 3
    found = load_file(trained / TRANSFORMER)
    if best is None:
        assert_same_weights(found, before)
        assert not (trained / "transformer_before_ema").exists()
    else:
        assert_same_weights(found, weights(tmp_path / "out" / "length-0.1" / "transformer"))
        assert_same_weights(weights(trained / "transformer_before_ema"), before)
    assert "the pipeline as it was" in (tmp_path / "out" / "ema.md").read_text()
    assert (tmp_path / "out" / "lengths.png").exists()


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_options_of_a_prior_become_its_defaults(images, tmp_path):
    make_plain_vq_model().save_pretrained(tmp_path / "vae")
    run(train_vqgan_prior, TINY_PRIOR + KEEP, output_dir=tmp_path / "run", vae=tmp_path / "vae", **images)
    flags = "--resolution 16 --validation_fraction 0.5 --num_images 12 --length 0.1 --temperature 0.8 --set_defaults"
    run(ema, flags, folder=tmp_path / "run", features="pixels", **images)
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert index["default_temperature"] == 0.8 and "default_num_inference_steps" not in index
    assert index["default_guidance_scale"] is not None


def test_weights_of_the_training_are_kept_however_often_others_are_chosen(trained):
    trained_weights = load_file(trained / TRANSFORMER)
    run(ema, "--length 0.05 0.1", folder=trained)
    sources = {length: trained / "ema" / f"length-{length:g}" / "transformer" for length in (0.05, 0.1)}
    halved, note = (
        trained / "pipeline" / "transformer" / name for name in ("diffusion_pytorch_model.fp16.safetensors", "note")
    )
    shutil.copy(trained / TRANSFORMER, halved)
    note.touch()
    for length, source in sources.items():
        put_into_pipeline(trained, "transformer", source, length)
        assert not halved.exists() and note.exists()
        assert_same_weights(weights(trained / "pipeline" / "transformer"), weights(source))
        assert_same_weights(weights(trained / "transformer_before_ema"), trained_weights)
        said = f"The weights are an average over the training, of length {length:g} (post-hoc EMA)."
        assert said in str(make_card(read_result(trained), "user/model"))
    again = {name: value + 1 for name, value in trained_weights.items()}  # the training went on
    save_file(again, trained / TRANSFORMER)
    put_into_pipeline(trained, "transformer", sources[0.1], 0.1)
    assert_same_weights(weights(trained / "transformer_before_ema"), again)
    DAEDiTPipeline.from_pretrained(trained / "pipeline")


def test_interrupted_choice_leaves_a_whole_pipeline(trained, monkeypatch):
    before = load_file(trained / TRANSFORMER)
    run(ema, "--length 0.1", folder=trained)
    source = trained / "ema" / "length-0.1" / "transformer"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", stop)
        with pytest.raises(KeyboardInterrupt):
            put_into_pipeline(trained, "transformer", source, 0.1)
    replace, calls = os.replace, []

    def stop_at_the_second(*paths):
        calls.append(paths)
        if sum("pipeline" in str(target) for _, target in calls) > 1:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr("dae_diffusers.store.os.replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            put_into_pipeline(trained, "transformer", source, 0.1)
    DAEDiTPipeline.from_pretrained(trained / "pipeline")
    assert_same_weights(weights(trained / "pipeline" / "transformer"), before)
    put_into_pipeline(trained, "transformer", source, 0.1)
    assert_same_weights(weights(trained / "pipeline" / "transformer"), weights(source))
    assert_same_weights(weights(trained / "transformer_before_ema"), before)


def test_a_prior_has_lengths_too(images, tmp_path):
    make_plain_vq_model().save_pretrained(tmp_path / "vae")
    run(train_vqgan_prior, TINY_PRIOR + KEEP, vae=tmp_path / "vae", output_dir=tmp_path, **images)
    run(ema, "--length 0.1", folder=tmp_path)
    made, stored = (
        load_file(tmp_path / "ema/length-0.1/prior/model.safetensors"),
        last_snapshot(tmp_path, "train_vqgan_prior"),
    )
    for name, value in made.items():
        assert_close(value, stored[f"0.1/{name}"].float(), atol=1e-5, rtol=0)
    assert made.keys() == load_file(tmp_path / PRIOR).keys()
    DAEVQGANPipeline.from_pretrained(tmp_path / "ema/length-0.1")


def test_runs_without_what_is_needed_are_named(trained, tmp_path, caplog):
    with pytest.raises(UserError, match="holds no `pipeline`.*Give the output folder of a finished train_dit.py"):
        run(ema, "--length 0.1", folder=tmp_path / "nothing")
    with pytest.raises(UserError, match="`length` 0.28 cannot be made of 6 snapshots.*They allow lengths from"):
        run(ema, "--length 0.1 0.28", folder=trained)
    assert not (trained / "ema").exists()
    files = find_snapshots(snapshots_folder(trained / "train_dit"))
    files[6].unlink()
    run(ema, "--length 0.1", folder=trained)
    assert "the last snapshot is of step 5 of 6: averages are those of that step" in caplog.text
    shutil.rmtree(snapshots_folder(trained / "train_dit"))
    with pytest.raises(UserError, match="holds no snapshots of averaged weights"):
        run(ema, "--length 0.1", folder=trained)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("runs/mine", "the following arguments are required: --length"),
        ("runs/mine --length 0.3", "`--length` is 0.3, but must be above 0 and at most 0.2886"),
        ("runs/mine --length 0.1 --set_defaults", "`--set_defaults` needs a distance to choose by: give `--features`"),
        ("runs/mine --length 0.1 --features judge", "give one of `--dataset_name`"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_config(EMAConfig, with_flags("ema", flags.split()))
    assert error.value.code == 2 and message in capsys.readouterr().err
