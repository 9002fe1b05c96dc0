"""The `dae-diffusers` command."""

import os
import sys

import pytest

from dae_diffusers import console


def command_of(monkeypatch, *argv: str) -> list[str]:
    seen = []
    monkeypatch.setattr(os, "execv", lambda path, command: seen.extend(command))
    console.main(list(argv))
    assert seen[0] == sys.executable
    return seen[1:]


def test_scripts_run_under_accelerate_and_keep_their_flags(monkeypatch):
    command = command_of(monkeypatch, "--num_processes", "2", "train-dit", "--vae", "train-dae")
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert command == [*launch, "-m", "dae_diffusers.training.train_dit", "--vae", "train-dae"]
    assert command_of(monkeypatch, "train_dae")[-1] == "dae_diffusers.training.train_dae"


def test_pushing_needs_no_accelerate(monkeypatch):
    assert command_of(monkeypatch, "push", "a", "b/c") == ["-m", "dae_diffusers.training.push", "a", "b/c"]


def test_list_names_every_script_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as exit_info:
        console.main([])
    assert exit_info.value.code == 0
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


def test_unknown_script_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_info:
        console.main(["train-vae"])
    assert exit_info.value.code == 2
    assert "Did you mean `train-dae`?" in capsys.readouterr().err
