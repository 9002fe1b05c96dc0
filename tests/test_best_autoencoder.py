"""Reconstructions watched while an autoencoder trains: their distance, and the weights of the best validation."""

import pytest
import torch
from accelerate import Accelerator
from models import save_backbone
from scripts import TINY_DAE, assert_same_weights, in_both_processes, log_of, resume, run, start, weights

from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.data import DataConfig, load_images, make_pass_loader
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.latents.statistics import compute_latent_statistics
from dae_diffusers.metrics.evaluation import encode_images, reconstruction_metrics
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.settings import compose
from dae_diffusers.training import train_dae
from dae_diffusers.training.settings import TrainDAEConfig

NAME = "validation/rfd_judge"
FLAGS = TINY_DAE + " --validation_fraction 0.5 --validation_steps 2"
JOINT = FLAGS + " --auxiliary_decoder none --stage1_steps 6 --learning_rate 0.3 --export best"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, image_folder):
    judge = save_backbone(tmp_path_factory.mktemp("inputs") / "judge", "classifier")
    return {"train_data_dir": image_folder, "metric_features": judge}


@pytest.fixture(scope="module")
def joint(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    run(train_dae, JOINT, output_dir=folder, **inputs)
    return folder


def validated(folder, name=NAME):
    return {row["step"]: row[name] for row in log_of(folder) if name in row}


def test_exported_autoencoder_is_that_of_the_best_validation(joint, inputs):
    """Its weights, its statistics, and all that the log says about its reconstructions, as `evaluate` measures them."""
    found = validated(joint)
    assert list(found) == [2, 4, 6, 8, 10]
    best = min(found, key=found.get)
    assert best != 10  # else this test shows nothing: the last weights would be the same
    assert_same_weights(weights(joint / "train_dae" / "best" / f"step-{best}"), weights(joint / "vae"))
    vae = load_autoencoder(str(joint / "vae"))
    data = DataConfig(
        train_data_dir=str(inputs["train_data_dir"]), resolution=16, image_channels=3, validation_fraction=0.5
    )
    train, validation = load_images(data)
    statistics = compute_latent_statistics(vae, make_pass_loader(train, batch_size=4))
    torch.testing.assert_close(vae.config.latents_mean, statistics.mean.tolist())
    torch.testing.assert_close(vae.config.latents_std, statistics.std.tolist())
    judge = load_feature_extractor(inputs["metric_features"])
    measured = reconstruction_metrics(encode_images(vae, validation, Accelerator(), extractor=judge), judge)
    assert {*measured} == {"psnr", "ssim", "rfd_judge"}
    for name, value in measured.items():
        assert validated(joint, f"validation/{name}")[best] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("step", [3, 10])
def test_resumed_run_exports_the_same(step, joint, inputs, tmp_path):
    resume(train_dae, JOINT, joint, tmp_path / "run", step, ("vae",), **inputs)
    assert (tmp_path / "run" / "train_dae" / "log.jsonl").read_text() == (joint / "train_dae" / "log.jsonl").read_text()
    for path in sorted((joint / "vae").iterdir()):
        assert (tmp_path / "run" / "vae" / path.name).read_bytes() == path.read_bytes()


def test_two_processes_measure_what_one_does(inputs, tmp_path):
    still = JOINT + " --learning_rate 1e-30 --stage1_steps 1 --stage2_steps 1"
    run(train_dae, still, output_dir=tmp_path / "1", **inputs)
    code, text = in_both_processes(lambda: start(still, output_dir=tmp_path / "2", **inputs))
    assert code == 0, text
    for name in (NAME, "validation/ssim"):
        one, two = (validated(tmp_path / count, name) for count in "12")
        assert one == pytest.approx(two, rel=1e-5) and list(one) == [2]
    assert_same_weights(*(weights(tmp_path / count / "vae") for count in "12"), atol=1e-20, rtol=0)


def test_a_codebook_counts_once_it_is_set(inputs, tmp_path):
    """Before, reconstructions get worse: the decoder learns latents that are not quantised, and sees quantised ones here."""
    flags = JOINT + " --autoencoder vq --codebook_size 8 --codebook_warmup_steps 4 --early_stopping_patience 1"
    run(train_dae, flags, output_dir=tmp_path, train_data_dir=inputs["train_data_dir"])
    found = validated(tmp_path, "validation/psnr")
    assert found.pop(4) < found.pop(2) and found
    best = max(found, key=found.get)
    assert_same_weights(weights(tmp_path / "train_dae" / "best" / f"step-{best}"), weights(tmp_path / "vae"))


def test_patience_ends_stage_2_alone_and_for_good(inputs, tmp_path, caplog):
    flags = FLAGS + " --stage2_steps 20 --learning_rate 1e-30 --early_stopping_patience 2 --export best"
    more = {"output_dir": tmp_path, **inputs}
    run(train_dae, flags, **more)
    found = validated(tmp_path)
    assert list(found) == [2, 4, 6, 8, 10]  # of stage 2 the first is the best
    assert_same_weights(weights(tmp_path / "train_dae" / "best" / "step-6"), weights(tmp_path / "vae"))
    before = weights(tmp_path / "vae")
    run(train_dae, flags, **more, resume_from_checkpoint="latest")
    assert validated(tmp_path) == found
    assert "`early_stopping_patience` 2 is used up since step 6, so no step follows" in caplog.text
    assert_same_weights(before, weights(tmp_path / "vae"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "1", "export": "best"}, "`export best` does not go with `stage 1`"),
        (
            {"stage": "3", "pipeline": "x", "early_stopping_patience": 1},
            "`early_stopping_patience` does not go with `stage 3`",
        ),
        (
            {"stage": "3", "pipeline": "x", "metric_features": "x", "feature_model": "x"},
            "`metric_features` x is also the `feature_model`",
        ),
        (
            {"metric_features": "x", "image_channels": 5},
            "`image_channels` is 5, but `metric_features` takes pictures",
        ),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose(TrainDAEConfig, train_data_dir="x", **settings)


def test_a_single_held_out_image_is_too_few_and_nothing_is_trained(inputs, tmp_path):
    with pytest.raises(UserError, match="`metric_features` .* needs 2 or more, but there is 1"):
        run(train_dae, f"{FLAGS} --max_validation_samples 1", output_dir=tmp_path, **inputs)
    assert not (tmp_path / "train_dae" / "log.jsonl").exists()
