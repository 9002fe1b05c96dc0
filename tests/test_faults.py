"""Whatever goes wrong while a script runs, one line says so, and a resumed run ends with the very same weights."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from safetensors.torch import load_file
from scripts import BARE_DAE, BARE_DIT, checkpoints, in_child, in_two_processes, log_of, start, weights

from dae_diffusers import data, locks
from dae_diffusers.autoencoders import objective
from dae_diffusers.engine import checkpointing, loop
from dae_diffusers.engine import log as runlog
from dae_diffusers.engine.batches import TrainingBatches
from dae_diffusers.engine.guard import NonFiniteGuard
from dae_diffusers.errors import UserError
from dae_diffusers.script import _message_of, run_script
from dae_diffusers.training import train_dae, train_dit


def assert_equals(reference: Path, folder: Path) -> None:
    """Every result and every logged value, bit by bit."""
    for result in ("vae", "stage1"):
        first, second = weights(reference / result), weights(folder / result)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [(path / "train_dae" / "log.jsonl").read_text() for path in (reference, folder)]
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("reference")
    code, text = in_child(lambda: start(BARE_DAE, train_data_dir=image_folder, output_dir=folder))
    assert code == 0, text
    return folder


def assert_resumes(reference: Path, folder: Path, image_folder: Path, flags: str = BARE_DAE) -> str:
    options = {"train_data_dir": image_folder, "output_dir": folder, "resume_from_checkpoint": "latest"}
    code, text = in_child(lambda: start(flags, **options))
    assert code == 0, text
    assert_equals(reference, folder)
    return text


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(point: str, call: int, action) -> None:
    """Runs `action` in this process, which kills itself at the `call`-th time that `point` is reached."""
    reached = [0]

    def is_due() -> bool:
        reached[0] += 1
        return reached[0] == call

    if point == "state half written":
        save_state = Accelerator.save_state

        def save_and_die(self, folder):
            save_state(self, folder)
            if is_due():
                os.truncate(Path(folder) / "model.safetensors", 100)
                die()

        Accelerator.save_state = save_and_die
    elif point == "before the manifest":
        Path.write_text = _before(Path.write_text, lambda path, *_: path.name == "checkpoint.json" and is_due())
    elif point == "before the rename":
        Path.rename = _before(Path.rename, lambda path, new: path.name.startswith("tmp-checkpoint") and is_due())
    elif point == "after the rename":
        checkpointing.flush_entries = _before(
            checkpointing.flush_entries, lambda folder: folder.name == "checkpoints" and is_due()
        )
    elif point == "before the rotation's rename":
        Path.rename = _before(Path.rename, lambda path, new: new.name.startswith("tmp-old-") and is_due())
    elif point == "in the rotation's removal":
        rmtree = shutil.rmtree

        def remove_half(folder, **options):
            if str(folder).find("tmp-old-") > 0 and Path(folder).exists() and is_due():
                (Path(folder) / "checkpoint.json").unlink()
                die()
            rmtree(folder, **options)

        shutil.rmtree = remove_half
    elif point == "while the record is replaced":
        Path.replace = _before(Path.replace, lambda path, new: new.name == "run.json" and is_due())
    elif point == "while the log is replaced":
        Path.replace = _before(Path.replace, lambda path, new: new.name == "log.jsonl" and is_due())
    elif point == "in the middle of a line of the log":
        log = runlog.RunLog.write

        def log_and_die(self, values, step):
            if is_due():
                with (self.folder / "log.jsonl").open("a") as file:
                    file.write('{"step": 3, "train/lo')
                die()
            log(self, values, step)

        runlog.RunLog.write = log_and_die
    elif point == "while the result is saved":
        train_dae.save_value_range = _before(train_dae.save_value_range, lambda *_: is_due())
    else:
        raise AssertionError(point)
    action()


def _before(function, is_due):
    def wrapped(*args, **kwargs):
        if is_due(*args):
            die()
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("state half written", 1),
        ("state half written", 3),
        ("before the manifest", 2),
        ("before the rename", 2),
        ("after the rename", 3),
        ("before the rotation's rename", 1),
        ("in the rotation's removal", 2),
        ("while the record is replaced", 2),
        ("while the log is replaced", 1),
        ("in the middle of a line of the log", 5),
        ("while the result is saved", 1),
    ],
)
def test_killed_at_the_worst_instant_resumes_bit_identically(point, call, reference, image_folder, tmp_path):
    flags = BARE_DAE + " --checkpoints_total_limit 1"
    options = {"train_data_dir": image_folder, "output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    code, text = in_child(lambda: killed_at(point, call, lambda: start(flags, **options)))
    assert code == -signal.SIGKILL, text
    assert_resumes(reference, tmp_path, image_folder, flags)
    assert len(checkpoints(tmp_path)) == 1
    assert not list((tmp_path / "train_dae" / "checkpoints").glob("tmp-*"))


def test_killed_again_and_again_resumes_bit_identically(reference, image_folder, tmp_path):
    options = {"train_data_dir": image_folder, "output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    for point in ("before the rename", "in the middle of a line of the log", "state half written"):
        code, text = in_child(lambda point=point: killed_at(point, 2, lambda: start(BARE_DAE, **options)))
        assert code == -signal.SIGKILL, text
    assert_resumes(reference, tmp_path, image_folder)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "manifest of another"])
def test_damaged_last_checkpoint_is_reported_and_the_one_before_used(damage, reference, image_folder, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "vae")
    before, last = (tmp_path / "run" / "train_dae" / "checkpoints" / name for name in checkpoints(reference)[-2:])
    if damage == "manifest of another":
        shutil.copyfile(before / "checkpoint.json", last / "checkpoint.json")
    else:
        os.truncate(last / "optimizer.bin", 0 if damage == "emptied" else 1000)
    text = assert_resumes(reference, tmp_path / "run", image_folder)
    assert f"{last} is damaged" in text and f"resuming from {before}" in text


@pytest.mark.parametrize(("line", "left"), [(1, "checkpoint-00000006"), (2, "checkpoint-00000007")])
def test_checkpoints_ahead_of_the_one_resumed_from_never_win(line, left, reference, image_folder, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    first, *ahead = checkpoints(reference)
    assert first == "checkpoint-00000006" and ahead == ["checkpoint-00000008"]
    chosen = tmp_path / "run" / "train_dae" / "checkpoints" / first
    flags = BARE_DAE + " --checkpointing_steps 1 --checkpoints_total_limit 1"
    options = {"train_data_dir": image_folder, "output_dir": tmp_path / "run"}
    # In step 7, before anything is saved, and in step 8, after saving step 7.
    hooked = functools.partial(killed_at, "in the middle of a line of the log", line)
    code, text = in_child(lambda: hooked(lambda: start(flags, resume_from_checkpoint=chosen, **options)))
    assert code == -signal.SIGKILL, text
    assert checkpoints(tmp_path / "run") == [left]
    assert_resumes(reference, tmp_path / "run", image_folder, flags)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some KiB, and changes its size or mode by mount options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> None:
        again = "remount," if os.path.ismount(disk) else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(disk)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a small tmpfs can only be mounted by root")

    yield disk, mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "-l", str(disk)], check=True)


def assert_one_line(text: str, *parts: str) -> None:
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), text
    assert "Traceback" not in text


def test_disk_that_is_full_while_saving_loses_nothing(small_disk, reference, image_folder):
    disk, mount = small_disk
    one = sum(
        path.stat().st_size for path in (reference / "train_dae" / "checkpoints" / "checkpoint-00000006").iterdir()
    )
    mount(f"size={one * 5 // 2 // 1024}k")
    options = {"train_data_dir": image_folder, "output_dir": disk}
    code, text = in_child(lambda: start(BARE_DAE + " --checkpoints_total_limit 9", **options))
    assert code == 1
    assert_one_line(text, "cannot be written", "--resume_from_checkpoint latest")
    assert "No space left on device" in text or "the disk is probably full" in text  # torch does not say why
    assert checkpoints(disk)
    assert not list((disk / "train_dae" / "checkpoints").glob("tmp-*"))
    mount("size=50m")
    assert_resumes(reference, disk, image_folder)


def test_read_only_output_is_refused_at_once(small_disk, image_folder):
    disk, mount = small_disk
    mount("size=1m,ro")
    code, text = in_child(lambda: start(BARE_DAE, train_data_dir=image_folder, output_dir=disk))
    assert code == 1
    assert_one_line(text, "cannot be written: Read-only file system")
    assert not list(disk.iterdir())


@pytest.mark.parametrize("save", ["safetensors", "torch", "manifest"])
def test_file_that_cannot_grow_stops_the_save_and_keeps_what_exists(save, reference, image_folder, tmp_path):
    """The same without a disk of its own: the system refuses files beyond a limit."""
    limit = {"safetensors": 5000, "torch": 0, "manifest": 500}[save]
    module, name = {
        "safetensors": (Accelerator, "save_state"),
        "torch": (torch, "save"),
        "manifest": (checkpointing, "sha256_of"),
    }[save]

    def action():
        original = getattr(module, name)

        def limited(*args, **kwargs):
            if checkpoints(tmp_path):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return original(*args, **kwargs)

        setattr(module, name, limited)
        start(BARE_DAE, train_data_dir=image_folder, output_dir=tmp_path)

    code, text = in_child(action)
    assert code == 1, text
    assert checkpoints(tmp_path) == ["checkpoint-00000002"]
    assert_resumes(reference, tmp_path, image_folder)


def test_second_run_on_a_folder_is_refused_until_the_first_is_dead(reference, image_folder, tmp_path):
    options = {"train_data_dir": image_folder, "output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    flags = BARE_DAE + " --dataloader_num_workers 1"  # a process that outlives the killed one for a while

    def hold():
        log = runlog.RunLog.write

        def log_and_wait(self, values, step):
            log(self, values, step)
            if step == 3:
                (tmp_path / "waiting").touch()
                time.sleep(100)

        runlog.RunLog.write = log_and_wait
        start(flags, **options)

    first = in_child(hold, wait=False)
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in ({}, {"resume_from_checkpoint": None}):
        refused = {name: value for name, value in {**options, **more}.items() if value is not None}
        code, text = in_child(lambda refused=refused: start(BARE_DAE, **refused))
        assert code == 1
        assert_one_line(text, f"in use by another run (process {first} ")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert_resumes(reference, tmp_path, image_folder)


def test_changed_images_are_refused_on_resume(reference, image_folder, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    shutil.copytree(image_folder, tmp_path / "images")
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "cat" / "00.png")
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name not in (".lock", ".owner")
    }
    options = {"output_dir": tmp_path / "run", "resume_from_checkpoint": "latest"}
    code, text = in_child(lambda: start(BARE_DAE, train_data_dir=tmp_path / "images", **options))
    assert code == 1
    assert_one_line(
        text, "the training images changed since", "Continue with the same", "pass `--accept_changed_images`"
    )
    assert before == {path: path.read_bytes() for path in before}
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "owl")
    code, text = in_child(
        lambda: start(BARE_DAE, train_data_dir=tmp_path / "images", accept_changed_images="yes", **options)
    )
    assert code == 1
    assert_one_line(text, "the classes changed since", "they were ['cat', 'dog'] and are ['dog', 'owl']")
    (tmp_path / "images" / "owl").rename(tmp_path / "images" / "cat")
    newest = max((tmp_path / "run" / "train_dae" / "checkpoints").glob("checkpoint-*"))
    shutil.rmtree(newest)  # the one of the end
    step = int(max((tmp_path / "run" / "train_dae" / "checkpoints").glob("checkpoint-*")).name.split("-")[1])
    options["accept_changed_images"] = "yes"
    for _ in range(2):  # again: the step is kept in the checkpoints
        code, text = in_child(lambda: start(BARE_DAE, train_data_dir=tmp_path / "images", **options))
        assert code == 0, text
        assert json.loads((tmp_path / "run" / "train_dae" / "run.json").read_text())["images_changed"] == [step]
        options.pop("accept_changed_images", None)


def test_another_encoder_is_refused_on_resume(reference, image_folder, tmp_path):
    options = {"script": train_dit, "train_data_dir": image_folder, "output_dir": tmp_path}
    code, text = in_child(lambda: start(BARE_DIT, vae=reference / "vae", **options))
    assert code == 0, text
    shutil.copytree(reference / "vae", tmp_path / "other")
    tensors = weights(tmp_path / "other")
    tensors["encoder.conv_in.bias"][0] += 1
    checkpointing.save_file(tensors, tmp_path / "other" / "diffusion_pytorch_model.safetensors")
    code, text = in_child(
        lambda: start(BARE_DIT, vae=tmp_path / "other", resume_from_checkpoint="latest", **options),
    )
    assert code == 1
    assert_one_line(text, "the encoder of `--vae` changed since")


@pytest.mark.parametrize("moment", ["store_init_configuration", "log", "finish"])
def test_tracker_that_fails_at_any_moment_is_left_alone(moment, reference, image_folder, tmp_path):
    pytest.importorskip("tensorboard")

    def action():
        def fail(*args, **kwargs):
            raise ConnectionError("the tracker's server is gone")

        setattr(TensorBoardTracker, moment, fail)
        start(BARE_DAE + " --report_to tensorboard", train_data_dir=image_folder, output_dir=tmp_path)

    code, text = in_child(action)
    assert code == 0, text
    assert text.count("training continues without it") == 1
    assert_equals(reference, tmp_path)


def test_data_loading_process_that_dies_is_one_line(reference, image_folder, tmp_path):
    def action():
        getitems = data.ImageDataset.__getitems__

        def get_and_die(self, items):
            if torch.utils.data.get_worker_info() is not None and checkpoints(tmp_path):
                die()
            return getitems(self, items)

        data.ImageDataset.__getitems__ = get_and_die
        start(BARE_DAE + " --dataloader_num_workers 1", train_data_dir=image_folder, output_dir=tmp_path)

    code, text = in_child(action)
    assert code == 1
    assert_one_line(text, "a data-loading process died", "--dataloader_num_workers")
    assert_resumes(reference, tmp_path, image_folder)


@pytest.mark.parametrize(("num_workers", "error"), [(1, RuntimeError), (0, ConnectionResetError)])
def test_data_loading_process_may_die_while_it_hands_a_batch_over(monkeypatch, num_workers, error):
    def lost():
        raise ConnectionResetError("by peer")
        yield

    monkeypatch.setattr("time.sleep", lambda _: None)
    batches = TrainingBatches(Accelerator(cpu=True), batch_size=1, seed=0, num_workers=num_workers)
    with pytest.raises(error) as caught:
        next(batches._timed(lost()))
    assert error is not RuntimeError or "a data-loading process died" in _message_of(caught.value)


def test_bad_image_in_a_data_loading_process_is_one_line(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    options = {"train_data_dir": tmp_path / "images", "output_dir": tmp_path / "run"}
    code, text = in_child(lambda: start(BARE_DAE + " --dataloader_num_workers 1", **options))
    assert code == 1
    assert_one_line(text, "cannot be decoded", ".png")


def with_bad_kl(bad: set[int], action) -> None:
    """Runs `action`; the KL loss of the micro-batches in `bad` is not a number."""
    kl_loss, seed_microbatch, current = objective.kl_loss, loop.seed_microbatch, [0]

    def remember(seed, microbatch):
        current[0] = microbatch
        seed_microbatch(seed, microbatch)

    loop.seed_microbatch = remember
    objective.kl_loss = lambda posterior: kl_loss(posterior) * (float("nan") if current[0] in bad else 1)
    action()


def test_loss_that_is_not_finite_stops_before_the_update(reference, image_folder, tmp_path):
    flags = BARE_DAE + " --gradient_accumulation_steps 2 --train_batch_size 2"
    options = {"train_data_dir": image_folder, "output_dir": tmp_path}
    code, text = in_child(lambda: with_bad_kl({5}, lambda: start(flags, **options)))
    assert code == 1
    assert_one_line(text, "`kl_loss` became nan at step 3, in micro-batch 5", "--skip_nonfinite")
    assert checkpoints(tmp_path) == ["checkpoint-00000002"]
    good = weights_of_checkpoint(tmp_path)
    assert all(value.isfinite().all() for value in good.values())


def weights_of_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "train_dae" / "checkpoints" / checkpoints(folder)[-1] / "model.safetensors")


def test_tolerated_update_is_left_out_and_counted_over_interruptions(image_folder, tmp_path):
    flags = BARE_DAE + " --skip_nonfinite 1 --stage 1 --checkpointing_steps 1 --checkpoints_total_limit 9 --no_use_ema"
    options = {"train_data_dir": image_folder, "output_dir": tmp_path}
    code, text = in_child(lambda: with_bad_kl({2, 3}, lambda: start(flags, **options)))
    assert code == 1
    assert "step 3, in micro-batch 2: this update is skipped, 1 of `--skip_nonfinite` 1" in text
    assert_one_line(text, "step 4, in micro-batch 3")
    before, after = (
        load_file(tmp_path / "train_dae" / "checkpoints" / f"checkpoint-{step:08d}" / "model.safetensors")
        for step in (2, 3)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not {"train/gradient_norm", "train/kl_loss"} & rows[2].keys() and "train/kl_loss" in rows[1]

    options["resume_from_checkpoint"] = "latest"
    code, text = in_child(lambda: with_bad_kl({3}, lambda: start(flags, **options)))
    assert code == 1
    assert_one_line(text, "step 4, in micro-batch 3")
    code, text = in_child(lambda: start(flags, **options))
    assert code == 0, text
    assert all(value.isfinite().all() for value in weights(tmp_path / "stage1").values())


def test_discriminator_of_an_update_left_out_is_left_out_with_it(tmp_path):
    guard = NonFiniteGuard(Accelerator(cpu=True), 1, tmp_path)
    bad, good = torch.tensor(float("inf")), torch.tensor(1.0)
    guard.watch(good, 1, 0)
    assert guard.allows(good) and guard.allows(good, "gradient norm of the discriminator")
    guard.note("l1", bad)
    guard.watch(bad, 2, 1)
    assert not guard.allows(good) and not guard.allows(bad, "gradient norm of the discriminator")
    assert guard.skipped == 1
    guard.watch(good, 3, 2)
    assert guard.allows(good)
    with pytest.raises(UserError, match="`gradient norm of the discriminator` became inf at step 3;"):
        guard.allows(bad, "gradient norm of the discriminator")


def test_all_processes_leave_the_same_update_out(image_folder, tmp_path):
    flags = BARE_DAE + " --skip_nonfinite 1 --stage 1 --auxiliary_decoder same"
    options = {"train_data_dir": image_folder}
    one = flags + " --gradient_accumulation_steps 2"
    code, text = in_child(lambda: with_bad_kl({5}, lambda: start(one, output_dir=tmp_path / "1", **options)))
    assert code == 0, text
    results = in_two_processes(lambda: with_bad_kl({5}, lambda: start(flags, output_dir=tmp_path / "2", **options)))
    assert [code for code, _ in results] == [0, 0], results
    text = results[0][1]
    assert (
        "a loss of another process was not finite at step 3" in text or "`gradient norm` became nan at step 3" in text
    )
    first, second = (weights(tmp_path / name / "stage1") for name in "12")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_run_of_several_processes_is_refused_by_all_of_them(reference, image_folder):
    results = in_two_processes(lambda: start(BARE_DAE, train_data_dir=image_folder, output_dir=reference))
    assert [code for code, _ in results] == [1, 1]
    text = results[0][1]
    assert_one_line(text, "holds another run")


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_the_run_goes_on_identically(image_folder, tmp_path):
    """Needs a rendezvous that can be met again: `--standalone`, or `--rdzv_backend c10d` on several machines."""

    def launch(folder: Path) -> subprocess.Popen:
        flags = f"{BARE_DAE} --stage1_steps 40 --resume_from_checkpoint latest --train_data_dir {image_folder}".split()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["--max_restarts", "1", "-m", "dae_diffusers.training.train_dae", *flags]
        return subprocess.Popen(
            [*command, "--output_dir", str(folder)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert launch(tmp_path / "whole").wait() == 0
    process = launch(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.01)
    owner = (tmp_path / "killed" / "train_dae" / ".owner").read_text().split()[1]
    os.kill(int(owner), signal.SIGKILL)
    assert process.wait() == 0
    assert_equals(tmp_path / "whole", tmp_path / "killed")


def test_interrupted_by_the_keyboard_before_training_ends_without_a_stack(capsys):
    def main(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        run_script(main, None)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == ""


def test_interrupt_while_python_tidies_up_is_not_forgotten():
    class Tidied:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def run(config):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Tidied()
        time.sleep(60)

    assert in_child(lambda: run_script(run, None)) == (-signal.SIGINT, "")


def test_lock_outlives_no_release(tmp_path):
    lock = locks.FolderLock(tmp_path)

    def take():
        locks.FolderLock._held.clear()
        try:
            locks.FolderLock(tmp_path)
        except UserError:
            raise SystemExit(7) from None

    assert in_child(take)[0] == 7
    lock.release()
    assert in_child(take)[0] == 0


@pytest.mark.parametrize(("bad_steps", "ends"), [(range(20), False), (range(99), True), (range(0, 99, 2), True)])
def test_gradient_that_no_loss_scale_makes_finite_ends_the_run(bad_steps, ends, tmp_path):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(
        device=weight.device, num_processes=1, mixed_precision="fp16", distributed_type=None, scaler=scaler
    )
    guard = NonFiniteGuard(accelerator, 0, tmp_path)
    expected = pytest.raises(UserError, match="`gradient norm` became inf at step .* has fallen to 0.00098; .*bf16")
    with expected if ends else nullcontext():
        for step in range(99):
            loss = (weight - weight.detach()).sqrt().sum() if step in bad_steps else weight.sum()
            guard.watch(loss, step + 1, step)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert guard.allows(torch.nn.utils.clip_grad_norm_([weight], 1.0))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
