"""A checkpoint is whole or does not exist; damage is reported and the one before is used."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from dae_diffusers.checkpointing import Checkpointer, StopSignal
from dae_diffusers.errors import UserError


@pytest.fixture
def accelerator():
    accelerator = Accelerator()
    accelerator.free_memory()
    yield accelerator
    accelerator.free_memory()


def train(accelerator, steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=0.9)

    def step():
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    for _ in range(steps):
        step()
    return model, ema, step


def test_restored_training_goes_on_identically(accelerator, tmp_path):
    checkpointer = Checkpointer(accelerator, tmp_path)
    model, ema, step = train(accelerator, 3)
    checkpointer.save(3, ema=ema, stage=1)
    step()
    expected = [p.clone() for p in (*model.parameters(), *ema.shadow_params)]

    accelerator.free_memory()
    model, ema, step = train(accelerator, 0)
    path, manifest = checkpointer.newest()
    assert manifest["step"] == 3 and manifest["state"] == {"stage": 1}
    checkpointer.load(path, ema=ema)
    step()
    assert all(torch.equal(a, b) for a, b in zip(expected, (*model.parameters(), *ema.shadow_params), strict=True))
    assert ema.optimization_step == 4


def test_restored_optimizers_keep_the_settings_they_were_made_with(accelerator, tmp_path):
    checkpointer = Checkpointer(accelerator, tmp_path)
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    before = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "eps": 1e-8}
    after = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-6}

    def make(settings):
        accelerator.free_memory()
        scheduled = torch.optim.AdamW(parameters[:1], **settings)
        scheduler = get_scheduler("cosine", scheduled, num_warmup_steps=2, num_training_steps=10)
        return accelerator.prepare(scheduled, scheduler, torch.optim.AdamW(parameters[1:], **settings))

    def step(scheduled, scheduler, constant):
        for parameter in parameters:
            parameter.grad = torch.ones(3)
        scheduled.step()
        constant.step()
        scheduler.step()
        return scheduler.get_last_lr()[0]

    objects = make(before)
    for _ in range(4):
        step(*objects)
    checkpointer.save(4)
    rates = [step(*objects) for _ in range(3)]
    for settings, factor in ((before, 1), (after, 0.5)):
        scheduled, scheduler, constant = objects = make(settings)
        checkpointer.load(tmp_path / "checkpoint-00000004")
        for group in (scheduled.param_groups[0], constant.param_groups[0]):
            assert {name: group[name] for name in ("betas", "weight_decay", "eps")} == {
                name: settings[name] for name in ("betas", "weight_decay", "eps")
            }
        assert constant.param_groups[0]["lr"] == settings["lr"]
        assert scheduled.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        assert [step(*objects) for _ in range(3)] == [factor * rate for rate in rates]


def test_only_the_newest_are_kept(accelerator, tmp_path):
    checkpointer = Checkpointer(accelerator, tmp_path, total_limit=2)
    train(accelerator, 0)
    for step in (1, 2, 3, 10):
        checkpointer.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000003", "checkpoint-00000010"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest", "broken manifest"])
def test_damaged_checkpoint_is_reported_and_the_one_before_used(accelerator, tmp_path, caplog, damage):
    checkpointer = Checkpointer(accelerator, tmp_path)
    train(accelerator, 0)
    for step in (1, 2):
        checkpointer.save(step)
    last = tmp_path / "checkpoint-00000002"
    weights = last / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(data[:-1])
    elif damage == "flipped":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        (last / "checkpoint.json").unlink()
    else:
        (last / "checkpoint.json").write_text("[")
    assert checkpointer.newest()[1]["step"] == 1
    assert "damaged" in caplog.text
    with pytest.raises(UserError, match="Try `latest`"):
        checkpointer.newest(str(last))


def test_a_folder_without_checkpoints_has_no_newest(accelerator, tmp_path):
    assert Checkpointer(accelerator, tmp_path / "nothing").newest() is None


def test_failed_save_leaves_the_one_before_whole(accelerator, tmp_path, monkeypatch):
    checkpointer = Checkpointer(accelerator, tmp_path, total_limit=1)
    train(accelerator, 0)
    checkpointer.save(1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(UserError, match="No space left"):
        checkpointer.save(2)
    assert checkpointer.newest()[1]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_asks_to_stop_and_becomes_the_exit_code(accelerator, number, capsys):
    before = signal.getsignal(number)
    with StopSignal(accelerator) as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        with pytest.raises(SystemExit) as exit_info:
            stop.exit()
    assert exit_info.value.code == 128 + number
    assert signal.getsignal(number) == before
