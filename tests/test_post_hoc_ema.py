"""Post-hoc EMA: averages of any length are made of snapshots of two, whatever happened to the training."""

import math
import shutil

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from models import make_plain_vq_model, save_autoencoder
from safetensors.torch import load_file
from scripts import (
    BARE_DIT,
    TINY_DIT,
    TINY_PRIOR,
    TRANSFORMER,
    assert_same_weights,
    assert_two_processes_equal_one,
    resume,
    run,
    weights,
)
from torch.testing import assert_close

from dae_diffusers.engine.post_hoc_ema.averages import PowerFunctionEMA
from dae_diffusers.engine.post_hoc_ema.power_function import combination, exponent_of
from dae_diffusers.engine.post_hoc_ema.settings import MAX_LENGTH
from dae_diffusers.engine.post_hoc_ema.snapshots import (
    LENGTHS,
    Snapshots,
    find_snapshots,
    keep_snapshot,
    snapshots_folder,
)
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.settings import compose
from dae_diffusers.store import cached_tensors, inputs_of_cached
from dae_diffusers.training import train_dit, train_vqgan_prior
from dae_diffusers.training.settings import TrainDiTConfig

STEPS, EVERY = 320, 10


def length_of(exponent: float) -> float:
    """The length of the average of an exponent, the inverse of `exponent_of`."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def brute_force(trajectory: torch.Tensor, length: float) -> torch.Tensor:
    """The average of weights `(T, ...)`: step t counts as much as the power function has between t - 1 and t."""
    edges = torch.linspace(0, 1, len(trajectory) + 1, dtype=torch.float64) ** (exponent_of(length) + 1)
    return torch.einsum("t,t...->...", edges.diff(), trajectory.double())


def random_walk(steps: int = STEPS) -> torch.Tensor:
    """Weights that drift, jump about and end near 1, `(T, 4)`."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(steps, 4, generator=generator, dtype=torch.float64).cumsum(0) / steps**0.5
    return (
        walk
        + 0.3 * torch.randn(steps, 4, generator=generator, dtype=torch.float64)
        + torch.linspace(0, 1, steps)[:, None]
    )


class Model(torch.nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.float())


def save_trajectory(folder, trajectory, *, every=EVERY):
    """Snapshots as a training writes them, whose weights are those of the trajectory."""
    model = Model(trajectory[0])
    averages = {length: PowerFunctionEMA(list(model.parameters()), length) for length in LENGTHS}
    for step, weight in enumerate(trajectory, start=1):
        model.weight.data.copy_(weight)
        for average in averages.values():
            average.step(list(model.parameters()))
        if step % every == 0 or step == len(trajectory):
            stored = {length: {"weight": each.shadow_params[0].half()} for length, each in averages.items()}
            keep_snapshot(folder, step, len(trajectory), stored)
    return model, averages


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25, MAX_LENGTH])
def test_lengths_are_the_deviations_of_the_profiles(length):
    exponent = exponent_of(length)
    assert length_of(exponent) == pytest.approx(length, rel=1e-6)
    times = (np.arange(200_000) + 0.5) / 200_000
    profile = times**exponent / (times**exponent).sum()
    mean = (profile * times).sum()
    assert np.sqrt((profile * (times - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0, -0.1, 0.29])
def test_impossible_lengths_have_no_exponent(length):
    with pytest.raises(ValueError, match="above 0 and at most 0.2886"):
        exponent_of(length)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2])
def test_moving_average_is_the_power_function_average(length):
    trajectory = random_walk(50)
    model = Model(trajectory[0])
    average = PowerFunctionEMA(list(model.parameters()), length)
    for weight in trajectory:
        model.weight.data.copy_(weight)
        average.step(list(model.parameters()))
    assert_close(average.shadow_params[0].double(), brute_force(trajectory, length), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.07, 0.1, 0.25])
def test_factors_sum_to_one_and_their_error_is_that_of_the_profile(length):
    lengths = np.tile(LENGTHS, 32)
    steps = np.repeat(np.arange(1, 33) / 32, 2)
    factors, error = combination(lengths, steps, length, 1.0)
    assert factors.sum() == pytest.approx(1, abs=1e-9)
    times = (np.arange(100_000) + 0.5) / 100_000
    profiles = [
        np.where(times <= step, (exponent_of(each) + 1) / step * (times / step) ** exponent_of(each), 0)
        for each, step in zip(lengths, steps, strict=True)
    ]
    wanted = (exponent_of(length) + 1) * times ** exponent_of(length)
    off = np.linalg.norm(factors @ np.array(profiles) - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(off, abs=2e-3)


@pytest.mark.parametrize("length", [0.02, 0.03, 0.07, 0.15, 0.2, 0.25])
def test_any_length_is_made_of_the_snapshots(length, tmp_path):
    trajectory = random_walk()
    model, _ = save_trajectory(tmp_path, trajectory)
    found = Snapshots(tmp_path).weights(length, model)["weight"]
    # Weights have a spread of about 0.4 over the training; half precision rounds what is stored by 0.0002.
    assert_close(found.double(), brute_force(trajectory, length), atol=0.02, rtol=0)
    others = [brute_force(trajectory, each) for each in (0.02, 0.25) if abs(each - length) > 0.05]
    assert all((found - other).abs().max() > 0.05 for other in others)  # else this test shows little


@pytest.mark.parametrize("length", LENGTHS)
def test_stored_lengths_are_given_back_as_they_were_stored(length, tmp_path):
    model, averages = save_trajectory(tmp_path, random_walk())
    stored = averages[length].shadow_params[0].half().float()
    assert_close(Snapshots(tmp_path).weights(length, model)["weight"], stored, atol=1e-6, rtol=0)


def test_ordinary_average_of_a_short_training_has_a_length_of_nine_hundredths(tmp_path):
    trajectory = random_walk()
    model, _ = save_trajectory(tmp_path, trajectory)
    ordinary = EMAModel(model.parameters(), decay=0.999)
    for weight in trajectory:
        model.weight.data.copy_(weight)
        ordinary.step(model.parameters())
    found = Snapshots(tmp_path).weights(length_of(8), model)["weight"]
    assert_close(found, ordinary.shadow_params[0], atol=0.01, rtol=0)


def test_weights_that_never_change_are_their_own_average(tmp_path):
    model, _ = save_trajectory(tmp_path, torch.full((40, 4), 0.75), every=5)
    assert_close(Snapshots(tmp_path).weights(0.2, model)["weight"], torch.full((4,), 0.75), atol=1e-5, rtol=0)


def test_too_few_snapshots_say_which_lengths_they_allow(tmp_path):
    model, _ = save_trajectory(tmp_path, random_walk(), every=40)
    with pytest.raises(
        UserError, match=r"`length` 0.01 cannot be made of 8 snapshots.*They allow lengths from 0.03\d to 0.2\d\d"
    ):
        Snapshots(tmp_path).weights(0.01, model)
    with pytest.raises(UserError, match="holds no snapshots of averaged weights. Only a training with `post_hoc_ema`"):
        Snapshots(tmp_path / "nothing")


def test_snapshot_that_was_lost_is_made_up_for(tmp_path):
    trajectory = random_walk()
    model, _ = save_trajectory(tmp_path, trajectory)
    list(find_snapshots(tmp_path).values())[10].unlink()
    found = Snapshots(tmp_path).weights(0.15, model)["weight"]
    assert_close(found.double(), brute_force(trajectory, 0.15), atol=0.02, rtol=0)


def test_damaged_snapshots_and_those_of_another_model_are_named(tmp_path):
    model, _ = save_trajectory(tmp_path, random_walk())
    with pytest.raises(
        UserError, match="another model than the pipeline's: its `weight` has the shape .4,., and should have .5,."
    ):
        Snapshots(tmp_path).weights(0.1, Model(torch.zeros(5)))
    path = find_snapshots(tmp_path)[20]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000020.safetensors is damaged.*Remove it"):
        Snapshots(tmp_path).weights(0.1, model)


def test_interrupted_write_leaves_the_snapshot_before(tmp_path, monkeypatch):
    stored = {length: {"weight": torch.ones(4).half()} for length in LENGTHS}
    keep_snapshot(tmp_path, 1, 2, stored)
    before = (tmp_path / "step-00000001.safetensors").read_bytes()

    def full(tensors, path, **kwargs):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            keep_snapshot(tmp_path, step, 2, stored)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert (tmp_path / "step-00000001.safetensors").read_bytes() == before


FLAGS = TINY_DIT + " --post_hoc_ema --post_hoc_ema_steps 2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, image_folder):
    return {"train_data_dir": image_folder, "vae": save_autoencoder(tmp_path_factory.mktemp("inputs") / "vae")}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(train_dit, FLAGS + " --checkpointing_steps 1", output_dir=folder, **inputs)
    return folder


def snapshots_of(folder, script="train_dit") -> dict[int, dict[str, torch.Tensor]]:
    files = find_snapshots(snapshots_folder(folder / script))
    return {step: cached_tensors(path, inputs_of_cached(path)) for step, path in files.items()}


def test_training_stores_the_averages_of_its_weights(trained):
    found = snapshots_of(trained)
    assert list(found) == [2, 4, 6]
    states = [
        load_file(trained / "train_dit/checkpoints" / f"checkpoint-{step:08d}" / "model.safetensors")
        for step in range(1, 7)
    ]
    for length in LENGTHS:
        for name in states[0]:
            expected = brute_force(torch.stack([state[name] for state in states]), length)
            assert_close(found[6][f"{length:g}/{name}"].double(), expected, atol=1e-4, rtol=1e-3)


def test_training_without_the_flag_is_the_same(trained, inputs, tmp_path):
    run(train_dit, TINY_DIT + " --checkpointing_steps 1", output_dir=tmp_path, **inputs)
    assert (trained / TRANSFORMER).read_bytes() == (tmp_path / TRANSFORMER).read_bytes()
    assert (trained / "train_dit/log.jsonl").read_text() == (tmp_path / "train_dit/log.jsonl").read_text()
    assert not snapshots_folder(tmp_path / "train_dit").exists()
    last = tmp_path / "train_dit/checkpoints/checkpoint-00000006"
    assert [path.name for path in last.glob("ema*")] == ["ema.safetensors"]


@pytest.mark.parametrize("step", [1, 4])
def test_resumed_run_has_the_same_snapshots(step, trained, inputs, tmp_path):
    resume(train_dit, FLAGS, trained, tmp_path / "run", step, ("pipeline",), **inputs)
    first, second = snapshots_of(trained), snapshots_of(tmp_path / "run")
    assert list(first) == list(second)
    for number, tensors in first.items():
        assert_same_weights(tensors, second[number])
    assert_same_weights(*(weights(folder / "pipeline" / "transformer") for folder in (trained, tmp_path / "run")))


def test_two_processes_store_what_one_does(inputs, tmp_path):
    flags = BARE_DIT + f" --post_hoc_ema --vae {inputs['vae']} --train_data_dir {inputs['train_data_dir']}"
    assert_two_processes_equal_one(train_dit, flags, tmp_path, "train_dit/post_hoc_ema/step-00000006.safetensors")


def test_snapshots_after_the_checkpoint_are_no_part_of_the_run(trained, inputs, tmp_path, caplog):
    # The first new snapshot is later than the old ones of steps 4 and 6.
    flags = FLAGS.replace("_steps 2", "_steps 8").replace("--max_train_steps 6", "--max_train_steps 8")
    resume(train_dit, flags, trained, tmp_path / "run", 2, ("pipeline",), **inputs)
    assert list(snapshots_of(tmp_path / "run")) == [2, 8]
    assert "step-00000004.safetensors: the run continued from an earlier step" in caplog.text


def test_a_run_that_begins_again_has_only_its_own_snapshots(trained, inputs, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for done in ("pipeline", "train_dit/checkpoints"):
        shutil.rmtree(tmp_path / "run" / done)
    flags = FLAGS.replace("_steps 2", "_steps 9") + " --resume_from_checkpoint latest"
    run(train_dit, flags.replace("--max_train_steps 6", "--max_train_steps 7"), output_dir=tmp_path / "run", **inputs)
    assert list(snapshots_of(tmp_path / "run")) == [7]


def test_resumed_run_keeps_what_it_began_with(trained, inputs, tmp_path):
    with pytest.raises(UserError, match="was trained with `post_hoc_ema`, but now it is left out. Give it again"):
        resume(train_dit, TINY_DIT, trained, tmp_path / "run", 3, ("pipeline",), **inputs)
    run(train_dit, TINY_DIT, output_dir=tmp_path / "without", **inputs)
    with pytest.raises(UserError, match="was trained without `post_hoc_ema`, but now it is on. Continue without it"):
        resume(train_dit, FLAGS, tmp_path / "without", tmp_path / "with", 3, ("pipeline",), **inputs)


def test_the_disk_that_snapshots_need_is_said(inputs, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(train_dit, BARE_DIT + " --post_hoc_ema --dry_run", output_dir=tmp_path, **inputs)
    assert "post-hoc EMA: a snapshot of two averages every 1 steps, 6 of 0.2 MiB, 1.2 MiB of disk in all" in caplog.text
    with pytest.raises(ConfigError, match="`post_hoc_ema_steps` needs `post_hoc_ema`"):
        compose(TrainDiTConfig, vae="v", train_data_dir="d", post_hoc_ema_steps=2)


def test_a_prior_keeps_averages_too(inputs, tmp_path):
    make_plain_vq_model().save_pretrained(tmp_path / "vae")
    more = {**inputs, "vae": tmp_path / "vae", "output_dir": tmp_path}
    run(train_vqgan_prior, TINY_PRIOR + " --post_hoc_ema --post_hoc_ema_steps 3", **more)
    assert list(snapshots_of(tmp_path, "train_vqgan_prior")) == [3, 6]
