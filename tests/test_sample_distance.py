"""The distance of samples while a generator trains: kept weights, early end, resumed and distributed runs."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import make_plain_vq_model, save_autoencoder, save_backbone
from safetensors.torch import load_file
from scripts import (
    PRIOR,
    TINY_DIT,
    TINY_PRIOR,
    TRANSFORMER,
    assert_same_weights,
    launch,
    log_of,
    resume,
    run,
    succeed,
    weights,
)

from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.metrics.monitor import SampleDistance, best_or_last
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.training import train_dit, train_vqgan_prior

NAME = "validation/gfd_judge"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("inputs")
    judge = save_backbone(folder / "judge", "classifier")
    vae = load_autoencoder(str(save_autoencoder(folder / "vae")))
    vae.register_to_config(latents_mean=[0.0] * 3, latents_std=[0.5] * 3, scaling_factor=1.0)
    vae.save_pretrained(folder / "vae")
    return {"train_data_dir": image_folder, "vae": folder / "vae", "metric_features": judge}


FLAGS = TINY_DIT + " --metric_images 12 --metric_steps 2"


@pytest.fixture(scope="module")
def watched(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    run(train_dit, FLAGS + " --export best --learning_rate 0.3", output_dir=folder, **inputs)
    return folder


def distances(folder, script="train_dit"):
    return {row["step"]: row[NAME] for row in log_of(folder, script) if NAME in row}


def test_best_pipeline_has_the_decoder_and_defaults_of_the_last(watched, tmp_path):
    """The decoder of stage 2 may have come after the best step, and a run may go on with another guidance."""
    best, last = (DAEDiTPipeline.from_pretrained(watched) for _ in range(2))  # from the output folder
    best.save_pretrained(tmp_path / "best")
    last.register_to_config(default_guidance_scale=3.25)
    for parameter in [*last.vae.parameters(), *last.transformer.parameters()]:
        parameter.data += 1
    monitor = SimpleNamespace(report=lambda: None, best_result=lambda: tmp_path / "best", state={"step": 2})
    of_run = SimpleNamespace(config=SimpleNamespace(monitor=SimpleNamespace(export="best")))
    of_run.accelerator = SimpleNamespace(is_main_process=False)
    best_or_last(of_run, last, monitor).save_pretrained(tmp_path / "found")
    found = DAEDiTPipeline.from_pretrained(tmp_path / "found")
    assert_same_weights(found.transformer.state_dict(), best.transformer.state_dict())
    assert_same_weights(found.vae.state_dict(), last.vae.state_dict())
    assert found.call_defaults["guidance_scale"] == 3.25


def test_best_weights_are_exported(watched):
    found = distances(watched)
    assert list(found) == [2, 4, 6]
    best = min(found, key=found.get)
    kept = watched / "train_dit" / "best" / f"step-{best}" / "transformer"
    assert_same_weights(weights(kept), weights(watched / "pipeline" / "transformer"))
    assert best != 6  # else this test shows nothing: the last weights would be the same


def test_measuring_leaves_training_as_it_is(watched, inputs, tmp_path):
    bare = {name: value for name, value in inputs.items() if name != "metric_features"}
    run(train_dit, TINY_DIT + " --learning_rate 0.3", output_dir=tmp_path, **bare)
    losses = [
        [row["train/loss"] for row in log_of(folder, "train_dit") if "train/loss" in row]
        for folder in (watched, tmp_path)
    ]
    assert losses[0] == losses[1]


def test_resumed_run_finds_the_same_best(watched, inputs, tmp_path, caplog):
    flags = FLAGS + " --export best --learning_rate 0.3"
    resume(train_dit, flags, watched, tmp_path / "run", 3, ("pipeline", "train_dit/best"), **inputs)
    assert distances(tmp_path / "run") == distances(watched)
    # The best one came before the checkpoint, and its folder is gone: the best since then is exported, and it is said.
    assert "the best weights so far, of step 2, are not in" in caplog.text
    found = {step: value for step, value in distances(tmp_path / "run").items() if step > 3}
    kept = tmp_path / "run" / "train_dit" / "best" / f"step-{min(found, key=found.get)}" / "transformer"
    assert_same_weights(weights(kept), weights((tmp_path / "run" / TRANSFORMER).parent))


@pytest.mark.parametrize("step", [2, 6])
def test_a_signal_ends_a_measurement_at_once_and_loses_nothing(step, watched, inputs, tmp_path, monkeypatch, capsys):
    flags = FLAGS + " --export best --learning_rate 0.3 --checkpointing_steps 100"
    measure = SampleDistance.measure

    def interrupted(monitor, pipeline, at):
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        return measure(monitor, pipeline, at)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(SampleDistance, "measure", interrupted)
        run(train_dit, flags, output_dir=tmp_path, **inputs)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "made again when the run goes on" in capsys.readouterr().out
    assert step not in distances(tmp_path)
    run(train_dit, flags, output_dir=tmp_path, resume_from_checkpoint="latest", **inputs)
    assert log_of(tmp_path, "train_dit") == log_of(watched, "train_dit")
    assert_same_weights(weights((tmp_path / TRANSFORMER).parent), weights((watched / TRANSFORMER).parent))


def test_a_kill_after_a_measurement_leaves_the_same_log(watched, inputs, tmp_path, monkeypatch):
    flags = FLAGS + " --export best --learning_rate 0.3 --checkpointing_steps 100 --checkpoints_total_limit 1"

    def killed(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(SampleDistance, "_compare", killed)  # the distance is in the log
        run(train_dit, flags, output_dir=tmp_path, **inputs)
    assert list(distances(tmp_path)) == [2]
    run(train_dit, flags, output_dir=tmp_path, resume_from_checkpoint="latest", **inputs)
    assert log_of(tmp_path, "train_dit") == log_of(watched, "train_dit")
    assert_same_weights(weights((tmp_path / TRANSFORMER).parent), weights((watched / TRANSFORMER).parent))


@pytest.mark.parametrize("change", ["images", "decoder"])
def test_best_of_another_measure_no_longer_counts(change, watched, inputs, tmp_path, caplog):
    flags = FLAGS + " --export best --learning_rate 0.3" + " --metric_images 20" * (change == "images")
    folder, more = tmp_path / "run", dict(inputs)
    if change == "decoder":
        vae = load_autoencoder(str(inputs["vae"]))
        vae.decoder.conv_out.bias.data += 0.5
        vae.register_to_config(latents_std=[2.0] * 3)  # measured over other images
        vae.save_pretrained(tmp_path / "vae")
        more["vae"] = tmp_path / "vae"
    resume(train_dit, flags, watched, folder, 3, ("pipeline",), **more)
    if change == "decoder":
        assert_same_weights(weights(tmp_path / "vae"), weights(folder / "pipeline" / "vae"))
        assert load_autoencoder(str(folder / "pipeline" / "vae")).config.latents_std == [0.5] * 3  # as before
    assert "the search for the best begins again" in caplog.text
    found = {step: value for step, value in distances(folder).items() if step > 3}
    best = min(found, key=found.get)
    assert (folder / "train_dit" / "best" / f"step-{best}").exists()


def test_patience_ends_a_run_for_good(inputs, tmp_path, caplog):
    flags = FLAGS.replace("--max_train_steps 6", "--max_train_steps 40") + " --learning_rate 0.3 --logging_steps 40"
    run(train_dit, flags + " --early_stopping_patience 2", output_dir=tmp_path, **inputs)
    found = distances(tmp_path)
    last = max(found)
    assert last < 40 and min(found, key=found.get) == last - 4
    assert [row["step"] for row in log_of(tmp_path, "train_dit") if "train/loss" in row] == [last]
    assert max(row["step"] for row in log_of(tmp_path, "train_dit")) == last
    again = {"output_dir": tmp_path, "resume_from_checkpoint": "latest", **inputs}
    run(train_dit, flags + " --early_stopping_patience 2", **again)
    assert distances(tmp_path) == found
    assert f"`early_stopping_patience` 2 is used up since step {last - 4}, so no step follows" in caplog.text
    flags = flags.replace("40", str(last + 2))
    run(train_dit, flags + " --early_stopping_patience 3", **again)
    assert max(distances(tmp_path)) == last + 2


def test_two_processes_measure_what_one_does(inputs, tmp_path):
    still = " --learning_rate 1e-30 --max_train_steps 2"
    started = {
        name: launch("train_dit", FLAGS + still, processes=count, output_dir=tmp_path / name, **inputs)
        for name, count in (("one", 1), ("two", 2))
    }
    for process in started.values():
        succeed(process)
    one, two = (distances(tmp_path / name) for name in started)
    assert one == pytest.approx(two, rel=1e-5) and list(one) == [2]


def test_a_prior_is_measured_too(inputs, tmp_path):
    make_plain_vq_model().save_pretrained(tmp_path / "vae")
    more = {**inputs, "vae": tmp_path / "vae", "output_dir": tmp_path}
    run(train_vqgan_prior, TINY_PRIOR + " --metric_images 12 --metric_steps 3", **more)
    assert list(distances(tmp_path, "train_vqgan_prior")) == [3, 6] and (tmp_path / PRIOR).exists()


def test_without_features_the_validation_loss_decides(inputs, tmp_path, caplog):
    make_plain_vq_model().save_pretrained(tmp_path / "vae")
    images = {"train_data_dir": inputs["train_data_dir"], "vae": tmp_path / "vae", "output_dir": tmp_path}
    flags = f"{TINY_PRIOR} --learning_rate 1 --max_train_steps 20 --validation_steps 1 --export best --early_stopping_patience 2"
    run(train_vqgan_prior, flags, **images)
    found = {
        row["step"]: row["validation/loss"] for row in log_of(tmp_path, "train_vqgan_prior") if "validation/loss" in row
    }
    best = min(found, key=found.get)
    assert max(found) == best + 2 < 20
    kept = tmp_path / "train_vqgan_prior" / "best" / f"step-{best}" / Path(PRIOR).relative_to("pipeline")
    assert_same_weights(load_file(kept), load_file(tmp_path / PRIOR))
    assert (
        f"was {found[best]:.4g} at step {best}. The model begins to learn its training images by heart" in caplog.text
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--metric_features judge --streaming", "`--streaming` does not go with `--metric_features`"),
        (
            "--metric_features judge --image_channels 5",
            "`--image_channels` is 5, but `--metric_features` takes pictures",
        ),
    ],
)
def test_wrong_settings_are_refused(flags, message, inputs, capsys):
    with pytest.raises((ConfigError, SystemExit)) as error:
        bare = {name: value for name, value in inputs.items() if name != "metric_features"}
        run(train_dit, f"{TINY_DIT} {flags}", output_dir="unused", **bare)
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*larger than the data set")
def test_a_single_image_is_too_few_to_compare_with_and_nothing_is_trained(inputs, tmp_path):
    with pytest.raises(UserError, match="`metric_features` .* needs 2 or more, but there is 1"):
        run(train_dit, f"{FLAGS} --max_train_samples 1", output_dir=tmp_path, **inputs)
    assert not (tmp_path / "train_dit" / "log.jsonl").exists()
