"""A config from flags and YAML; a mistake is one line and an exit code."""

import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import MISSING
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from scripts import in_child
from tqdm.auto import tqdm

from dae_diffusers.cli import parse_config
from dae_diffusers.console import find_scripts
from dae_diffusers.errors import ConfigError, UserError, in_full
from dae_diffusers.generators.settings import DIT_LAYERS
from dae_diffusers.metrics.settings import SamplingConfig
from dae_diffusers.script import as_typed, run_script, with_dashes
from dae_diffusers.settings import (
    compose,
    config_text,
    field,
    fields_of,
    flags_of,
    flat,
    part,
    settings,
    without_effect,
)
from dae_diffusers.training.settings import (
    SCRIPTS,
    CacheLatentsConfig,
    PreviewConfig,
    TrainDAEConfig,
    TrainDiTConfig,
    TrainPriorConfig,
)
from dae_diffusers.transformer_dae_dit import DIT_SIZES

CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"


@settings
class Part:
    """A part."""

    steps: int = field(10, "number of steps", at_least=1)
    widths: list[int] = field([1, 2], "some widths")


@settings
class Rest:
    """The rest."""

    kind: Literal["a", "b"] = field("a", "the kind")
    name: str | None = field(None, "a name")
    flag: bool = field(True, "a switch")
    rare: float = field(0.5, "for experts", above=0, at_most=1, needs="kind b or flag", advanced=True)


@settings
class Whole:
    """The whole."""

    one: Part = part()
    rest: Rest = part(name="here")

    def __post_init__(self):
        if self.one.steps == 13 and self.rest.kind == "b":
            raise ConfigError("`steps` 13 does not go with `kind b`.")


def error_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parse_config(Whole, list(argv))
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def _required(config_class) -> list[str]:
    """Values of the flags without a default."""
    return [
        word for _, each, default in fields_of(config_class) if default is MISSING for word in (f"--{each.name}", "x")
    ]


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 5\nkind: b\nwidths: [3, 4, 5]\nflag: false\n")
    config = parse_config(Whole, ["--config", str(path), "--steps", "7"])
    assert config == compose(Whole, steps=7, kind="b", widths=[3, 4, 5], flag=False)
    assert parse_config(Whole, []) == compose(Whole)


@pytest.mark.parametrize("text", ["007", "1.10", "1_0", "0x1F", "12:30", "2024-01-01", "no", "1e3", ".inf"])
def test_yaml_values_are_the_text_that_stands_there(text, tmp_path):
    (tmp_path / "config.yaml").write_text(f"name: {text}\nflag: off\nwidths: [010, 9]\n")
    config = parse_config(Whole, ["--config", str(tmp_path / "config.yaml")])
    assert config == compose(Whole, name=text, flag=False, widths=[10, 9])


def test_saved_config_is_read_back(tmp_path):
    config = compose(Whole, steps=3, name="x y: z", widths=[9], flag=False)
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert parse_config(Whole, [f"--config={tmp_path / 'config.yaml'}"]) == config


def test_prompts_may_be_empty_or_hold_dollars():
    assert SamplingConfig(prompt="").prompt == "" and SamplingConfig(prompt="for $x").prompt == "for $x"


@pytest.mark.parametrize("config_class", [TrainDAEConfig, TrainDiTConfig, TrainPriorConfig, CacheLatentsConfig])
def test_saved_config_of_every_script_is_read_back(config_class, tmp_path):
    config = parse_config(config_class, ["--dataset_name", "digits", *_required(config_class)])
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert parse_config(config_class, ["--config", str(tmp_path / "config.yaml")]) == config


def test_packaged_recipes_are_found_by_name_and_home_is_expanded(monkeypatch, tmp_path):
    config = parse_config(TrainDAEConfig, ["--config", "digits", "--output_dir=~/here"])
    values = yaml.safe_load((CONFIGS / "digits_dae.yaml").read_text())
    assert {name: flat(config)[name] for name in values} == values
    assert config.run.output_dir == str(Path.home() / "here")


def test_flags_that_make_a_config_make_it_again():
    config = parse_config(Whole, ["--steps", "3", "--no_flag", "--name", "x", "--widths", "4"])
    assert parse_config(Whole, flags_of(config)) == config
    assert flags_of(compose(Whole)) == []


def test_messages_of_the_library_get_dashes_before_flags_only():
    text = with_dashes("`steps` is 0; see `other`, `kind b` and `steps=2`.", ["steps", "kind"])
    assert text == "`--steps` is 0; see `other`, `--kind b` and `--steps=2`."


def test_scripts_are_named_as_they_were_called():
    text = "Run `accelerate launch training/train_dit.py --vae x`, or `evaluate.py`; not `my_evaluate.py`."
    assert (
        as_typed(text, True)
        == "Run `dae-diffusers train-dit --vae x`, or `dae-diffusers evaluate`; not `my_evaluate.py`."
    )
    assert as_typed(text, False) == text
    for name in find_scripts():
        assert as_typed(f"training/{name.replace('-', '_')}.py", True) == f"dae-diffusers {name}"


def test_paths_are_shown_in_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert in_full("my_images") == f" (looked for {tmp_path}/my_images)" and in_full(tmp_path) == ""


def test_warnings_have_no_source_lines():
    def action():
        run_script(lambda config: None, compose(Whole))
        print(warnings.formatwarning("few images", UserWarning, "code.py", 3, "a line of code"), end="")

    assert in_child(action) == (0, "warning: few images\n")


def test_changed_settings_that_lack_what_they_need_are_named_in_a_warning():
    assert not any(map(without_effect, (compose(Whole, flag=False), compose(Whole, rare=0.4), None)))
    assert not without_effect(compose(Whole, rare=0.4, flag=False, kind="b"))
    idle = compose(Whole, rare=0.4, flag=False)
    assert without_effect(idle) == ["`rare` has no effect without `kind b` or `flag`."]
    code, text = in_child(lambda: run_script(lambda config: None, idle))
    assert code == 0 and "`--rare` has no effect without `--kind b` or `--flag`." in text


def test_settings_need_settings_that_exist():
    fields = [each for config_class in SCRIPTS.values() for _, each, _ in fields_of(config_class)]
    needs = {need for each in fields for need in re.split(" or | and ", each.metadata["needs"]) if need}
    assert needs and {need.partition(" ")[0] for need in needs} <= {each.name for each in fields}


def test_what_needs_a_setting_that_the_script_lacks_is_no_idle_flag():
    config = compose(SCRIPTS["ema"], folder="x", length=[0.1], mixed_precision="bf16")
    assert not without_effect(config)


@pytest.mark.parametrize(
    ("script", "flags", "idle"),
    [
        ("train-dae", "--auxiliary_decoder none --noise_tau 0.5", "`noise_tau` has no effect without `stage 2` or `stage 3`."),
        ("train-dae", "--auxiliary_decoder none --equivariance 0.5", ""),
        ("train-dae", "--feature_model x --pool_size 9", "`feature_model`, `pool_size` have no effect without `stage 3`."),
        ("train-dae", "--stage 1 --noise_tau 0.5 --equivariance 0.5", "`noise_tau` has no effect without `stage 2` or `stage 3`."),
        (
            "train-dae",
            "--stage 2 --stage1_dir x --auxiliary_decoder prefix --equivariance 0.5",
            "`auxiliary_decoder`, `equivariance` have no effect without `stage 1`.",
        ),
        ("train-dae", "--stage 3 --pipeline x --feature_model y --noise_tau 0.5 --pool_size 9", ""),
        ("train-dae", "--auxiliary_dropout 0.1 --auxiliary_decoder prefix", "`auxiliary_dropout` has no effect without `auxiliary_decoder dropout`."),
        ("train-dae", "--vf_weight 1", "`vf_weight` has no effect without `vf_model`."),
        ("train-dae", "--stage 1 --adversarial_weight 0.1", "`adversarial_weight` has no effect without `stage 2` or `stage 3` or `auxiliary_decoder none`."),
        ("train-dae", "--stage 1 --stage2_steps 9", "`stage2_steps` has no effect without `stage 2` or `auxiliary_decoder none`."),
        ("train-dae", "--stage 1 --config cifar10_small_gan", ""),
        ("train-dae", "--stage 2 --stage1_dir x --config digits --stage1_steps 9", "`stage1_steps` has no effect without `stage 1`."),
        ("train-dae", "--auxiliary_decoder none --stage1_steps 9 --stage2_steps 9 --adversarial_weight 0.1", ""),
        ("train-dae", "--autoencoder vq --kl_weight 1", "`kl_weight` has no effect without `autoencoder kl`."),
        (
            "train-dae",
            "--autoencoder vq --quantizer fsq --fsq_levels 8 8 --latent_channels 9 --codebook_size 99",
            "`latent_channels`, `codebook_size` have no effect without `quantizer ema` or `quantizer vq`.",
        ),
        ("train-dae", "--autoencoder vq --quantizer vq --codebook_warmup_steps 7", "`codebook_warmup_steps` has no effect without `quantizer ema`."),
        ("train-dae", "--stage 3 --pipeline x --learning_rate 1e-4", "`learning_rate` has no effect without `stage 1` or `stage 2`."),
        (
            "train-dae",
            "--stage 3 --pipeline x --generated_loss adversarial --generated_batch_size 7 --moments_share 0.5",
            "`generated_batch_size`, `moments_share` have no effect without `generated_loss moments`.",
        ),
        (
            "train-dae",
            "--stage 3 --pipeline x --autoencoder vq --latent_channels 7 --codebook_size 99",
            "`autoencoder`, `latent_channels`, `codebook_size` have no effect without `stage 1` or `stage 2`.",
        ),
        ("train-dit", "--learning_rate 1e-4 --lr_warmup_steps 9", ""),
        (
            "train-dit",
            "--lr_scheduler constant --lr_warmup_steps 9",
            "`lr_warmup_steps` has no effect without `lr_scheduler constant_with_warmup` or `lr_scheduler linear` or `lr_scheduler cosine` or "
            "`lr_scheduler warmup_stable_decay`.",
        ),
        ("train-dit", "--repa_weight 1 --lr_decay_share 0.5 --lr_scheduler warmup_stable_decay", "`repa_weight` has no effect without `repa_model`."),
        ("train-dit", "--class_dropout_prob 0 --autoguidance_steps 9 --sample_guidance_scale 1.5", ""),
        ("evaluate", "--guidance_scales 1 2", "`guidance_scales` has no effect without `pipeline`."),
    ],
)  # fmt: skip
def test_flags_without_effect(script, flags, idle):
    vae = [] if script == "train-dae" else ["--vae", "x"]
    config = parse_config(SCRIPTS[script], ["--dataset_name", "digits", *vae, *flags.split()])
    assert without_effect(config) == ([idle] if idle else [])


def test_compose_refuses_what_no_part_has():
    with pytest.raises(TypeError, match="stepps"):
        compose(Whole, stepps=3)


def test_named_sizes_are_those_of_the_transformer():
    assert {name: sizes[0] for name, sizes in DIT_SIZES.items()} == DIT_LAYERS


def test_empty_list_is_refused_where_the_default_is_none(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("widths: []")
    assert "expected at least one argument" in error_of(capsys, "--config", str(tmp_path / "config.yaml"))


def test_negative_numbers_with_an_exponent_are_values(tmp_path):
    (tmp_path / "config.yaml").write_text("value_range: [-1.0e-5, 1.0e-5]")
    argv = ["--dataset_name", "digits"]
    config = parse_config(TrainDAEConfig, [*argv, "--config", str(tmp_path / "config.yaml")])
    assert config.data.value_range == [-1e-5, 1e-5]
    for number in ("-1e-3", "-1E-3", "-.5e-3", "-2.e+1", "-.5", "-3"):
        config = parse_config(TrainDAEConfig, [*argv, "--value_range", number, "100"])
        assert config.data.value_range == [float(number), 100]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], "Did you mean `--steps`"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--steps", "0"], "`--steps` is 0, but must be at least 1"),
        (["--steps", "13", "--kind", "b"], "`--steps` 13 does not go with `--kind b`"),
        (["--rare", "0"], "above 0 and at most 1"),
        (["--rare", "nan"], "must be finite"),
        (["--name", ""], "`--name` is empty. Give a value, or leave it out."),
        (["--name=$HOME/runs"], "`--name` is $HOME/runs, but variables are not filled in here"),
        (["--name", "a/${USER}"], "variables are not filled in"),
        (["--config", "nothing"], "neither a file nor a packaged recipe"),
        (["7"], "unexpected argument '7'"),
        (["--config", "/nowhere.yaml"], "does not exist"),
        (["--config"], "needs the path"),
        (["--config", "a.yaml", "--config=b.yaml"], "`--config` is given twice (a.yaml, b.yaml). Give one file"),
    ],
)
def test_wrong_flags_are_answered_in_one_line(argv, message, capsys):
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", "unknown field `stepps`. Did you mean `steps`?"),
        ("steps: many", "invalid int value"),
        ("steps: {a: 1}", "is a mapping"),
        ("steps:", "has no value"),
        ("- 1\n- 2", "holds a list"),
        ("steps: 1\nkind: b\nsteps: 2", "cannot be read as YAML: `steps` stands twice"),
        ("flag: []", "`flag` must be yes or no, but is an empty list"),
        ("widths: [1, [2]]", "`widths` must be a list of values"),
        ("steps: [1", "cannot be read as YAML"),
        ("steps: " + 2000 * "[" + 2000 * "]", "is nested too deeply"),
        ("!!python/object/apply:os.system ['touch hacked']", "cannot be read as YAML"),
    ],
)
def test_wrong_yaml_is_answered_in_one_line(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    assert message in error_of(capsys, "--config", "config.yaml")
    assert not (tmp_path / "hacked").exists()


def test_help_shows_groups_types_and_defaults(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(Whole, ["--help"], description="What it does.")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text and "A part:" in text and "The rest:" in text
    assert "number of steps (default: 10)" in " ".join(text.split())
    assert "--no_flag" in text and "--no-flag" not in text and "--rare" not in text
    with pytest.raises(SystemExit):
        parse_config(Whole, ["--help_all"])
    assert "for experts (default: 0.5)" in " ".join(capsys.readouterr().out.split())


def test_user_errors_of_a_script_are_one_line_and_an_exit_code(capsys):
    for error, code in ((UserError("it failed"), 1), (ConfigError("it is wrong"), 2)):

        def run(config, error=error):
            raise error

        with pytest.raises(SystemExit) as exit_info:
            run_script(run, None)
        assert exit_info.value.code == code
        assert capsys.readouterr().err == f"error: {error}\n"


def test_memory_that_does_not_suffice_is_one_line(capsys):
    for error in (MemoryError("Unable to allocate 8.00 TiB"), torch.OutOfMemoryError("CUDA out of memory. Tried\nto")):

        def run(config, error=error):
            raise error

        with pytest.raises(SystemExit) as exit_info:
            run_script(run, None)
        assert exit_info.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: out of memory ({' '.join(str(error).split())}). Use a smaller batch")


def test_optional_package_that_is_missing_is_one_line(capsys):
    def run(config):
        raise ImportError("SSIM needs the package torchmetrics: `pip install torchmetrics`.")

    with pytest.raises(SystemExit) as exit_info:
        run_script(run, None)
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == "error: SSIM needs the package torchmetrics: `pip install torchmetrics`.\n"


def test_other_errors_are_not_hidden():
    def run(config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_script(run, None)


@pytest.mark.parametrize("config_class", SCRIPTS.values(), ids=list(SCRIPTS))
def test_every_flag_of_every_script_has_help(config_class, capsys):
    fields = [each for _, each, _ in fields_of(config_class)]
    assert [each.name for each in fields if not each.metadata.get("help")] == []
    assert len({each.name for each in fields}) == len(fields)
    with pytest.raises(SystemExit):
        parse_config(config_class, ["--help_all"])
    assert "None (default" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_config(config_class, ["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 60


def test_images_on_the_command_line_replace_those_of_the_file(tmp_path):
    config = parse_config(TrainDAEConfig, ["--config", "cifar10_small_dae", f"--train_data_dir={tmp_path}"])
    assert (config.data.dataset_name, config.data.train_data_dir) == (None, str(tmp_path))
    assert config.data.resolution == 32


def test_a_typed_length_replaces_the_other_one_of_the_file(tmp_path, capsys):
    path, source = tmp_path / "config.yaml", ["--dataset_name", "digits", "--vae", "v"]
    path.write_text("num_train_epochs: 2.5\nmax_train_steps: 70\n")
    for typed, expected in (("", (2.5, 70)), ("--max_train_steps=9", (None, 9)), ("--num_train_epochs=3", (3, 10000))):
        config = parse_config(TrainDiTConfig, ["--config", str(path), *source, *typed.split()])
        assert (config.optimization.num_train_epochs, config.transformer.max_train_steps) == expected
    with pytest.raises(SystemExit):
        parse_config(TrainDiTConfig, [*source, "--num_train_epochs", "3", "--max_train_steps", "9"])
    assert "`--num_train_epochs` and `--max_train_steps` both say how long to train" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config_classes = {"dit": TrainDiTConfig, "prior": TrainPriorConfig}
    config_class = config_classes.get(path.stem.split("_")[-1], TrainDAEConfig)
    values = yaml.safe_load(path.read_text())
    source = [] if "dataset_name" in values else ["--train_data_dir", "images"]
    source += _required(config_class)
    config = parse_config(config_class, ["--config", str(path), *source])
    assert without_effect(config) == []
    assert {name: flat(config)[name] for name in values} == values
    shown = flat(parse_config(PreviewConfig, ["--config", path.stem, *source]))  # "preview with the same flags"
    assert {name: shown[name] for name in values.keys() & shown.keys()} == {
        name: value for name, value in values.items() if name in shown
    }


def test_folder_below_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda config: (tmp_path / "file" / "x").mkdir(parents=True), None)
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: Not a directory: {tmp_path / 'file' / 'x'}. ")


def test_output_folder_that_is_removed_meanwhile_is_one_line(tmp_path, capsys):
    def run(config):
        raise RuntimeError("Parent directory does not exist.")  # torch's way to say it

    config = compose(TrainDAEConfig, dataset_name="digits", output_dir=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as exit_info:
        run_script(run, config)
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the output folder {tmp_path / 'run'} was removed")


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(2, "No such file", "/elsewhere/x")])
def test_other_errors_before_the_output_folder_is_made_are_not_hidden(error, tmp_path):
    def run(config):
        raise error

    config = compose(TrainDAEConfig, dataset_name="digits", output_dir=str(tmp_path / "run"))
    with pytest.raises(type(error)):
        run_script(run, config)


def test_reader_of_the_help_that_leaves_is_no_error():
    script = Path(__file__).parents[1] / "training" / "train_dae.py"
    source = "import os, runpy, sys; os.close(sys.stdin.fileno()); runpy.run_path(sys.argv[1], run_name='__main__')"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", source, str(script), "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_process_killed_while_it_draws_a_bar_does_not_stop_those_of_others():
    def die_drawing() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    def draw_after_it() -> None:
        tqdm(total=1).close()  # makes the lock
        in_child(die_drawing)
        drawing = threading.Thread(target=lambda: tqdm(total=1).close(), daemon=True)
        drawing.start()
        drawing.join(20)
        assert not drawing.is_alive(), "the lock was lost with the process"

    code, text = in_child(draw_after_it)  # not in this process: the lock would be lost to all tests after this one
    assert code == 0, text
