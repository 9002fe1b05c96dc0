"""A checkpoint is whole or does not exist; damage is reported and the one before is used."""

import json
import os
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from dae_diffusers import signals
from dae_diffusers.engine import run
from dae_diffusers.engine.checkpointing import Checkpointer, find_checkpoints
from dae_diffusers.engine.guard import raise_if_not_finite_weights
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.locks import take_folder
from dae_diffusers.signals import StopSignal, is_launcher, resuming_command


@pytest.fixture(autouse=True)
def heard_signals():
    """As in a terminal: where the tests run in the background, or under `nohup`, some are ignored."""
    heard = {number: signal.SIG_DFL for number in signals.STOPPING} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    checkpointer.save(3, averages={"ema": ema}, stage=1)
    step()
    expected = [p.clone() for p in (*model.parameters(), *ema.shadow_params)]

    accelerator.free_memory()
    model, ema, step = train(accelerator, 0)
    path, manifest = checkpointer.newest()
    assert manifest["step"] == 3 and manifest["state"] == {"stage": 1}
    checkpointer.load(path, averages={"ema": ema})
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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folders_that_the_user_made_are_never_chosen_nor_removed(accelerator, tmp_path):
    checkpointer = Checkpointer(accelerator, tmp_path, total_limit=1)
    train(accelerator, 0)
    checkpointer.save(2)
    users = ["checkpoint-best", "checkpoint-2", "checkpoint-00000002.bak", "checkpoint-00000009", "tmp-mine"]
    for name in users:
        shutil.copytree(tmp_path / "checkpoint-00000002", tmp_path / name)
    (tmp_path / "checkpoint-00000077").touch()
    assert checkpointer.newest()[0].name == "checkpoint-00000002"
    checkpointer.save(3)
    assert names(tmp_path) == sorted([*users, "checkpoint-00000003", "checkpoint-00000077"])
    assert checkpointer.newest(str(tmp_path / "checkpoint-best"))[1]["step"] == 2


def test_rotation_removes_only_what_this_run_has_saved(accelerator, tmp_path, caplog):
    train(accelerator, 0)
    for folder, steps in (("other", (1, 4, 9)), ("mine", (1, 2))):
        checkpointer = Checkpointer(accelerator, tmp_path / folder, total_limit=9)
        for step in steps:
            checkpointer.save(step)
    for step in (4, 9):
        shutil.copytree(tmp_path / "other" / f"checkpoint-{step:08d}", tmp_path / "mine" / f"checkpoint-{step:08d}")

    resumed = Checkpointer(accelerator, tmp_path / "mine", total_limit=1)
    assert resumed.newest()[1]["step"] == 2  # saved last, though another run's step is larger
    resumed.save(4)
    assert names(tmp_path / "mine") == [
        "checkpoint-00000004", "checkpoint-00000004-other-run-1", "checkpoint-00000009",
    ]  # fmt: skip
    assert "does not belong to this run" in caplog.text
    assert resumed.newest()[1]["step"] == 4


def test_checkpoints_ahead_of_where_a_run_begins_are_set_aside_until_the_next_save(accelerator, tmp_path, caplog):
    train(accelerator, 0)
    Checkpointer(accelerator, tmp_path / "other").save(5)
    checkpointer = Checkpointer(accelerator, tmp_path)
    for step in (2, 4, 6):
        checkpointer.save(step)
    shutil.copytree(tmp_path / "other" / "checkpoint-00000005", tmp_path / "checkpoint-00000005")
    shutil.rmtree(tmp_path / "other")

    resumed = Checkpointer(accelerator, tmp_path)
    resumed.newest(str(tmp_path / "checkpoint-00000002"))
    resumed.set_aside_after(2)
    abandoned = [f"abandoned-checkpoint-{step:08d}" for step in (4, 6)]
    assert names(tmp_path) == [*abandoned, "checkpoint-00000002", "checkpoint-00000005"]
    assert f"checkpoint-00000006 is renamed to {abandoned[1]}: the run continues from step 2" in caplog.text
    assert resumed.newest()[1]["step"] == 2
    assert resumed.newest(str(tmp_path / abandoned[1]))[1]["step"] == 6
    resumed.save(3)
    assert names(tmp_path) == [f"checkpoint-{step:08d}" for step in (2, 3, 5)]


def test_checkpoints_of_another_run_alone_are_gone_on_from(accelerator, tmp_path):
    train(accelerator, 0)
    Checkpointer(accelerator, tmp_path).save(5)
    assert Checkpointer(accelerator, tmp_path).newest()[1]["step"] == 5


def test_checkpoints_that_do_not_name_their_run_are_rotated_by_the_run_that_goes_on(accelerator, tmp_path):
    checkpointer = Checkpointer(accelerator, tmp_path, total_limit=9)
    train(accelerator, 0)
    for step in (1, 2, 3):
        checkpointer.save(step)
        manifest = tmp_path / f"checkpoint-{step:08d}" / "checkpoint.json"
        facts = json.loads(manifest.read_text())
        del facts["run"], facts["saved"]
        manifest.write_text(json.dumps(facts))
    for step in (4, 5):
        resumed = Checkpointer(accelerator, tmp_path, total_limit=2)
        assert resumed.newest()[1]["step"] == step - 1
        resumed.save(step)
    assert names(tmp_path) == ["checkpoint-00000004", "checkpoint-00000005"]


def test_steps_of_more_than_eight_digits_are_in_order(accelerator, tmp_path):
    checkpointer = Checkpointer(accelerator, tmp_path)
    train(accelerator, 0)
    for step in (99_999_999, 100_000_000):
        checkpointer.save(step)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-99999999", "checkpoint-100000000"]
    assert checkpointer.newest()[1]["step"] == 100_000_000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weights", "averages"])
def test_weights_that_are_not_finite_are_not_saved_and_the_last_good_checkpoint_stays(
    accelerator, tmp_path, place, value
):
    checkpointer = Checkpointer(accelerator, tmp_path, total_limit=1)
    model, ema, _ = train(accelerator, 1)
    checkpointer.save(1, averages={"ema": ema})
    with torch.no_grad():
        (model.weight if place == "weights" else ema.shadow_params[0])[1, 1] = value
    name = "weight" if place == "weights" else "average 0"
    with pytest.raises(UserError, match=f"checkpoint of step 2 cannot be saved: 1 of its weights .* `{name}`"):
        checkpointer.save(2, averages={"ema": ema})
    assert names(tmp_path) == ["checkpoint-00000001"]
    assert checkpointer.newest()[1]["step"] == 1


def test_export_of_weights_that_are_not_finite_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).half()
    raise_if_not_finite_weights(model, "the model")
    model[1].running_var[0] = torch.inf
    with pytest.raises(UserError, match="the model cannot be saved: 1 of its weights .* `1.running_var`"):
        raise_if_not_finite_weights(model, "the model")


def test_models_compiled_by_accelerate_are_refused_before_anything_is_saved(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ConfigError, match="`dynamo_backend` is eager, but must be no.* Use `compile`"):
        Checkpointer(Accelerator(), tmp_path / "checkpoints")
    assert not list(tmp_path.iterdir())


def test_processes_that_would_each_train_alone_are_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as `accelerate launch --multi_gpu` does where there is no GPU
    with pytest.raises(ConfigError, match="2 processes were started.*`ACCELERATE_USE_CPU=true`"):
        take_folder(tmp_path / "run", Accelerator())
    assert not list(tmp_path.iterdir())


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="`mixed_precision` is fp16, which needs a GPU. On a CPU use bf16 or no."):
        take_folder(tmp_path / "run", Accelerator(cpu=True, mixed_precision="fp16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("launcher", "cores", "command", "warns"),
    [(7, 4, "", True), (None, 4, "", False), (7, 1, "", False), (7, 4, "dae-diffusers train-dae", False)],
)
def test_one_thread_is_said_only_where_a_launcher_chose_it(
    launcher, cores, command, warns, accelerator, monkeypatch, caplog
):
    monkeypatch.setattr(run, "launcher_pid", lambda: launcher)
    monkeypatch.setattr(run, "num_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.delenv("DAE_DIFFUSERS_COMMAND", raising=False)
    if command:  # it uses all cores by itself: one thread was asked for
        monkeypatch.setenv("DAE_DIFFUSERS_COMMAND", command)
    run.start_messages(accelerator)
    assert caplog.messages == (
        [
            "one CPU thread of 4 is in use, the launcher's default. Give it more: put `OMP_NUM_THREADS=4` before the command."
        ]
        if warns
        else []
    )


@pytest.mark.parametrize("number", signals.STOPPING)
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


def test_what_the_caller_ignores_stays_ignored(accelerator):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with StopSignal(accelerator) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_same_signal_from_terminal_and_launcher_is_one_wish_and_a_later_one_kills(accelerator, monkeypatch):
    with StopSignal(accelerator) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        monkeypatch.setattr(signals, "SAME_WISH_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_last_line_says_what_was_saved_and_how_to_go_on(accelerator, capsys, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(SystemExit), StopSignal(accelerator) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.exit(step=436, command=resuming_command(["dae-diffusers", "train-dae", "--output_dir", "my run"]))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "saved step 436; go on with: dae-diffusers train-dae --output_dir 'my run' --resume_from_checkpoint latest"
    )
    for given in (["--resume_from_checkpoint", "x"], ["--resume_from_checkpoint=x"]):
        assert resuming_command(["a", *given, "b"]) == "a b --resume_from_checkpoint latest"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # without it, accelerate would start one process
    assert resuming_command(["a"]) == "ACCELERATE_USE_CPU=true a --resume_from_checkpoint latest"
    assert resuming_command(["a", "--cpu"]) == "a --cpu --resume_from_checkpoint latest"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as accelerate leaves it
    assert resuming_command(["a"]) == "a --resume_from_checkpoint latest"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/venv/bin/python /venv/bin/accelerate launch train.py", True),
        ("python3.11 -m accelerate.commands.launch -m dae_diffusers.training.train_dae", True),
        ("/usr/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -u -W error -m torch.distributed.run train.py", True),
        ("python /venv/bin/dae-diffusers train-dae", True),
        ("-bash", False),
        ("bash /home/me/accelerate launch", False),
        ("nohup accelerate launch", False),
        ("python train.py accelerate", False),
        ("python -c accelerate", False),
        ("python -m", False),
        ("tmux", False),
        ("", False),
    ],
)
def test_only_launchers_are_launchers(command, expected):
    assert is_launcher(command.split()) == expected
