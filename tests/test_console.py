"""The `dae-diffusers` command."""

import os
import signal
import subprocess
import sys

import pytest
from scripts import BARE_DAE, checkpoints, in_child

import dae_diffusers
from dae_diffusers import console
from dae_diffusers.script import num_cores

CONSOLE = [sys.executable, "-m", "dae_diffusers.console"]


def command_of(monkeypatch, *argv: str) -> tuple[list[str], dict[str, str]]:
    """What the command becomes: its words without Python's, and its environment."""
    seen = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: seen.append((command, environment)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("DAE_DIFFUSERS_COMMAND", "")
    monkeypatch.setenv("HF_HOME", "/nowhere")
    console.main(list(argv))
    ((command, environment),) = seen
    assert command[0] == sys.executable
    return command[1:], environment


def test_one_process_takes_the_place_of_the_command_and_keeps_its_flags(monkeypatch, capsys):
    flags = ("--dataset_name", "digits", "--output_dir", "my run")
    command, environment = command_of(monkeypatch, "--mixed_precision", "bf16", "train-dae", *flags)
    assert command == ["-m", "dae_diffusers.training.train_dae", *flags]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment["DAE_DIFFUSERS_COMMAND"].endswith(
        "--mixed_precision bf16 train-dae --dataset_name digits --output_dir 'my run'"
    )
    assert int(environment["OMP_NUM_THREADS"]) == num_cores()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    assert command_of(monkeypatch, "train_dae", *flags)[0][1] == "dae_diffusers.training.train_dae"


def test_number_of_threads_that_was_asked_for_is_kept(monkeypatch):
    asked = command_of(monkeypatch, "--num_cpu_threads_per_process", "1", "train-dae", "--config", "digits")
    assert asked[1]["OMP_NUM_THREADS"] == "1"


def test_pushing_and_help_need_no_accelerate(monkeypatch, capsys):
    assert command_of(monkeypatch, "push", "a", "b/c")[0] == ["-m", "dae_diffusers.training.push", "a", "b/c"]
    with pytest.raises(SystemExit) as exit_info:
        console.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0 and "Measure an autoencoder" in text and "--guidance_scales" in text


def test_wrong_flag_or_path_is_answered_before_anything_slow_is_loaded(tmp_path):
    for flags, code, text in (
        (["--resolutionn", "3"], 2, "Did you mean `--resolution`?"),
        (["--train_data_dir", "nowhere"], 1, "`--train_data_dir` nowhere is not a folder"),
        (["--config", "digits", "--pretrained_model_name_or_path", "./none"], 1, "./none does not exist"),
        (["--config", "digits", "--perceptual_model", "runs/none"], 1, "`--perceptual_model` runs/none does not exist"),
    ):
        source = "import sys; from dae_diffusers import console\ntry: console.main(sys.argv[1:])\nfinally: print(*{'torch', 'transformers'} & set(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", source, "train-dae", *flags], cwd=tmp_path, capture_output=True, text=True
        )
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (code, "\n") and text in line


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["--num_processes", "2", "--cpu", "train-dae", "--config", "digits"],
            "`ACCELERATE_USE_CPU=true` in the environment",
        ),
        (["--multi_gpu", "--num_processes", "1", "train-dae", "--config", "digits"], "at least 2 processes"),
        (["--config_file", "/none.yaml", "train-dae", "--config", "digits"], "/none.yaml"),
        (["train-vae"], "Did you mean `train-dae`?"),
        (["--mixed_precision"], "no script is called '--mixed_precision'"),
    ],
)
def test_wrong_command_is_one_line(argv, text, capsys, monkeypatch):
    monkeypatch.setenv("DAE_DIFFUSERS_COMMAND", "")
    with pytest.raises(SystemExit) as exit_info:
        console.main(argv)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dae-diffusers: error: ") and text in line


def test_list_names_every_script_with_a_sentence(capsys):
    console.main([])
    listed = capsys.readouterr().out
    for name, text in console.find_scripts().items():
        assert f"  {name} " in listed and text.endswith(".") and text in listed
    assert {
        "train-dae",
        "train-dit",
        "train-classifier",
        "cache-latents",
        "evaluate",
        "complexity",
        "push",
    } <= console.find_scripts().keys()


def test_version(capsys):
    console.main(["--version"])
    assert capsys.readouterr().out == f"dae-diffusers {dae_diffusers.__version__}\n"


def test_reader_that_leaves_is_no_error():
    def action():
        read, write = os.pipe()
        os.close(read)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as in every Python process
        os.dup2(write, 1)
        console.main([])

    code, text = in_child(action)
    assert (code, text) == (0, "")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_command_ends_with_our_line_and_our_exit_code(processes, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / "images" / f"broken{number}.png").write_bytes(b"no picture")
    launch = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    flags = ["train-dae", *BARE_DAE.split(), "--train_data_dir", "images", "--output_dir", "run"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [*CONSOLE, *launch, *flags], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200
    )
    lines = [line.strip() for line in result.stderr.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Stage 1:")]  # without the progress bar
    assert result.returncode == 1, result.stderr
    assert "error: the image" in "".join(lines) and "images/broken" in result.stderr, result.stderr
    assert lines[-1].startswith("error") and "Traceback" not in result.stderr, result.stderr
    assert "accelerate launch" not in result.stderr and "thread" not in result.stderr
    assert not checkpoints(tmp_path / "run")
