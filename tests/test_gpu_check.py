"""The script for a machine that is lent for ten minutes: each part keeps its time, and none stops the others."""

import sys
from pathlib import Path

import pytest
from scripts import load_benchmark


@pytest.fixture(scope="module")
def gpu_check():
    return load_benchmark("gpu_check")


@pytest.fixture
def check(gpu_check, tmp_path, monkeypatch):
    def make(*flags: str):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output_dir", str(tmp_path / "out"), *flags])
        return gpu_check.Check(gpu_check.parse_arguments())

    return make


def notes(check) -> list[str]:
    return (check.folder / "check.md").read_text().splitlines()


def test_part_that_fails_or_needs_too_long_does_not_stop_the_others(check, gpu_check, monkeypatch):
    made = check("--device", "cpu")
    assert made.run("good", ["-c", "print('seen')"], log="log.txt", seconds=60)
    assert not made.failed
    saves = "import signal, time\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
    saves += "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    assert not made.run("long", ["-c", saves], log="log.txt", seconds=5)
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    assert not made.run("deaf", ["-c", deaf], log="log.txt", seconds=1)
    assert not made.failed  # a training goes on the next time
    assert not made.run("bad", ["-c", "raise SystemExit(3)"], log="log.txt", seconds=60)
    assert not made.run("late", ["-c", ""], log="log.txt", seconds=0)
    assert made.failed
    assert (made.folder / "log.txt").read_text() == "seen\nsaved\n"
    ends = ["done", "stopped when its time was up", "stopped when its time was up", "failed with 3", "no time left"]
    assert [line.split(": ")[1].split(",")[0] for line in notes(made)] == ends


def test_flags_without_a_value_are_refused(check, capsys):
    with pytest.raises(SystemExit):
        check("--dae_flags", "stage1_steps=2", "stage2_steps")
    assert "`--dae_flags` stage2_steps is not FLAG=VALUE." in capsys.readouterr().err


def test_training_goes_on_and_leaves_its_pictures(check, image_folder, monkeypatch):
    flags = f"--device cpu --recipe digits --flags train_data_dir={image_folder} image_channels=3 resolution=16 train_batch_size=4"
    flags += " --dae_flags stage1_steps=1 stage2_steps=1 norm_num_groups=8 --dit_flags max_train_steps=1 num_layers=1 num_sample_images=2"
    made = check(*flags.split(), "sample_steps=1")
    made.training()
    assert [line.split(",")[0] for line in notes(made)] == ["- train_dae: done", "- train_dit: done"]
    names = {path.name for path in Path(made.folder).glob("*.png")}
    assert {"train_dae_curves.png", "train_dit_curves.png", "train_dit_samples-00000001.png"} <= names
    assert not made.failed


@pytest.mark.parametrize("is_there", [True, False])
def test_package_is_installed_where_it_is_missing(is_there, check, gpu_check, monkeypatch):
    def distribution(name):
        if not is_there:
            raise gpu_check.importlib.metadata.PackageNotFoundError(name)

    calls = []
    monkeypatch.setattr(gpu_check.importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(gpu_check.Check, "run", lambda self, name, words, **options: calls.append((name, words[-1])))
    check().install()
    assert calls == ([] if is_there else [("this package", ".")])
