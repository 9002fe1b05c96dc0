"""The laws of the complexity distance, and of the processes that train its pilots."""

import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from models import make_autoencoder, make_plain_vq_model, save_backbone
from PIL import Image
from scripts import in_child, launched_here, run

from dae_diffusers.comparison.scripts import ScriptError, launch_script, work_alone
from dae_diffusers.comparison.sharing import share
from dae_diffusers.comparison.trials import Ruler
from dae_diffusers.complexity import pilots
from dae_diffusers.complexity.pilots import measure_pilots
from dae_diffusers.complexity.report import complexity_distance, plot_complexity, summarize, to_markdown
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.data.arrays import save_value_range
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.settings import changes_of, compose
from dae_diffusers.training import complexity
from dae_diffusers.training.settings import MeasureComplexityConfig

DATA = {"dataset_name": "digits", "image_channels": 1, "resolution": 16, "max_train_samples": 48}
DATA |= {"max_validation_samples": 24}
TINY = ComplexityConfig(
    widths=[8, 16], pilot_steps=[2], pilot_layers=1, train_batch_size=8, num_images=12, num_inference_steps=1
)
pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular")


def save_vae(folder, factor: float = 1.0) -> str:
    """An autoencoder whose latents are those of the first one times a factor."""
    torch.manual_seed(0)
    vae = make_autoencoder("none", in_channels=1, out_channels=1).to_diffusers()
    with torch.no_grad():
        last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
        half = len(last.bias) // 2
        last.weight[:half] *= factor
        last.bias[:half] *= factor
        last.bias[half:] += 2 * math.log(factor)
        first = vae.decoder.conv_in if vae.post_quant_conv is None else vae.post_quant_conv
        first.weight /= factor
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """An autoencoder, a feature extractor, the folder of its pilots, and their rows."""
    folder = tmp_path_factory.mktemp("pilots")
    vae, features = save_vae(folder / "vae"), save_backbone(folder / "judge", "classifier")
    with launched_here():
        rows = measure_pilots(vae, DATA, TINY, folder / "rows", features=features)
    return vae, features, folder / "rows", rows


def distances(rows) -> list[float]:
    return [value for row in rows for value in (row["validation_loss"], row["gfd_judge"])]


def test_finished_pilots_are_not_repeated_and_others_are_added(measured):
    vae, features, folder, rows = measured
    with launched_here() as calls:
        assert measure_pilots(vae, DATA, TINY, folder, features=features) == rows
        assert calls == []
        more = compose(ComplexityConfig, **changes_of(TINY) | {"widths": [16, 8], "pilot_steps": [2, 3]})
        four = measure_pilots(vae, DATA, more, folder, features=features)
        assert [name for name, _ in calls] == ["cache_latents", "train_dit", "train_dit"]
        assert [four[2], four[0]] == rows
        assert len({row["validation_loss"] for row in four}) == 4
        few = compose(ComplexityConfig, **changes_of(TINY) | {"num_images": 5})
        with pytest.raises(UserError, match="`num_images` 5, but at least 10, 2 and 10 are needed"):
            measure_pilots(vae, DATA, few, folder, features=features)
        # Without features only the loss: nothing is trained for it.
        assert [row["validation_loss"] for row in measure_pilots(vae, DATA, TINY, folder)] == [
            row["validation_loss"] for row in rows
        ]
        assert len(calls) == 3 and not list(folder.glob("pilots/*/latents*"))


def test_pilots_are_measured_again_on_other_held_out_images(measured, image_folder, tmp_path):
    """Their loss on those is the distance where no features are given."""
    for split in ("train", "validation"):
        shutil.copytree(image_folder, tmp_path / "images" / split)
    data = {"train_data_dir": str(tmp_path / "images"), "image_channels": 1, "resolution": 16}
    pilot = compose(ComplexityConfig, **changes_of(TINY) | {"widths": [8]})
    with launched_here() as calls:
        (first,) = measure_pilots(measured[0], data, pilot, tmp_path / "rows")
        Image.new("L", (20, 20)).save(next((tmp_path / "images" / "validation").rglob("*.png")))
        (second,) = measure_pilots(measured[0], data, pilot, tmp_path / "rows")
    assert first["validation_loss"] != second["validation_loss"]
    assert [name for name, _ in calls] == 2 * ["cache_latents", "train_dit"]


def test_scale_of_the_latents_changes_nothing(measured, tmp_path):
    _, features, _, rows = measured
    with launched_here():
        scaled = measure_pilots(save_vae(tmp_path / "vae", 4.0), DATA, TINY, tmp_path / "rows", features=features)
    assert distances(scaled) == pytest.approx(distances(rows), rel=2e-3)


def test_two_processes_share_the_pilots_and_give_the_rows_of_one(measured, tmp_path):
    vae, features, _, rows = measured

    def measure():
        with launched_here() as calls:
            shared = measure_pilots(vae, DATA, TINY, tmp_path / "rows", features=features)
        assert distances(shared) == pytest.approx(distances(rows), rel=1e-6)
        (tmp_path / f"calls-{os.getpid()}.json").write_text(json.dumps(calls))

    processes = [in_child(measure, wait=False) for _ in range(2)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    calls = [call for path in tmp_path.glob("calls-*.json") for call in json.loads(path.read_text())]
    assert sorted(name for name, _ in calls) == ["cache_latents", "train_dit", "train_dit"]


def test_refitted_decoder_has_the_same_latents(measured, tmp_path):
    vae, features, _, rows = measured
    refit = compose(ComplexityConfig, **changes_of(TINY) | {"refit_steps": 4, "widths": [8]})
    with launched_here() as calls:
        (row,) = measure_pilots(vae, DATA, refit, tmp_path, features=features)
    assert [name for name, _ in calls] == ["train_dae", "cache_latents", "train_dit"]
    assert row["validation_loss"] == pytest.approx(rows[0]["validation_loss"], rel=1e-3)
    assert row["gfd_judge"] != rows[0]["gfd_judge"]


def test_script_writes_a_report_for_a_codebook_too(tmp_path):
    make_plain_vq_model(in_channels=1, out_channels=1).save_pretrained(tmp_path / "vae")
    flags = " ".join(f"--{name} {value}" for name, value in DATA.items())
    flags += " --widths 8 --pilot_seeds 0 1 --pilot_steps 2 --pilot_layers 1 --patch_size 1 --train_batch_size 8 --num_images 12"
    with launched_here() as calls:
        for _ in range(2):
            run(complexity, flags + " --refit_steps 2", vae=tmp_path / "vae", output_dir=tmp_path / "complexity")
    assert [name for name, _ in calls] == ["train_dae", "cache_latents", "train_dit", "train_dit"]
    result = json.loads((tmp_path / "complexity" / "complexity.json").read_text())
    losses = [row["validation_loss"] for row in result["pilots"]]
    assert result["distance"] == pytest.approx(math.sqrt(losses[0] * losses[1]))
    assert result["summary"][0]["seeds"] == 2
    assert (tmp_path / "complexity" / "complexity.md").read_text().startswith("# Complexity distance\n\nD = ")
    assert (tmp_path / "complexity" / "complexity.png").stat().st_size > 5000


def test_distance_is_the_geometric_mean_and_the_table_has_a_line_for_each_width(tmp_path):
    rows = [
        {
            "width": width,
            "steps": 9,
            "seed": seed,
            "cpu_seconds": 1.0,
            "parameters": 10 * width,
            "validation_loss": 1.0,
            "gfd_x": gfd,
        }
        for width, seed, gfd in ((8, 0, 4.0), (8, 1, 6.0), (16, 0, 2.0), (16, 1, 2.0))
    ]
    assert complexity_distance(rows) == pytest.approx((4 * 6 * 2 * 2) ** (1 / 4))
    first, second = summarize(rows)
    assert (first["gfd_x"], second["gfd_x"]) == (5, 2)
    assert first["gfd_x_std"] == pytest.approx(math.sqrt(2)) and second["gfd_x_std"] == 0
    assert summarize(rows[:1])[0]["gfd_x_std"] is None
    assert to_markdown(rows).count("\n| ") == 3
    plot_complexity({"a": rows, "b": rows[:1]}, tmp_path / "plot.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_complexity({}, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pilot_seeds": []}, "`pilot_seeds` is"),
        ({"widths": [64, 64]}, "`widths` is"),
        ({"widths": [6]}, "`widths` holds 6, but must hold multiples of 4"),
        ({"pilot_steps": [0]}, "`pilot_steps` is 0, but"),
        ({"seed": -1}, "`seed` is -1"),
        ({"streaming": True}, "`streaming`"),
        ({"random_crop": True}, "`random_crop`"),
        ({"caption_column": "text"}, "`caption_column` cannot be used with complexity.py"),
        ({"continuous_columns": ["angle"]}, "`continuous_columns` cannot be used with complexity.py"),
        ({"features": "x", "image_channels": 5}, "is 5, but `features` takes pictures"),
        ({"dataset_name": None}, "`dataset_name`"),
    ],
)
def test_flags_are_checked(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose(MeasureComplexityConfig, **{"vae": "x", "dataset_name": "digits", **change})


def test_ruler_measures_in_the_range_of_the_autoencoder_and_in_float32(tmp_path, monkeypatch):
    """Whatever precision accelerate was configured for: trainings and reconstructions have none of it."""
    for number in range(8):
        Image.fromarray(np.full((16, 16), 4000 * number, np.uint16)).save(tmp_path / f"{number}.png")
    vae = tmp_path / "vae"
    make_autoencoder("none", in_channels=1, out_channels=1).to_diffusers().save_pretrained(vae)
    save_value_range([0.0, 30000.0], tmp_path / "vae")
    data = {"train_data_dir": str(tmp_path), "resolution": 16, "image_channels": 1, "validation_fraction": 0.25}
    features = save_backbone(tmp_path / "judge", "resnet")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    ruler = Ruler({"data": data, "features": features, "num_images": 6}, vae, 0, tmp_path / "reference")
    assert ruler.train.value_range == [0, 30000] and ruler.accelerator.mixed_precision == "no"


def test_images_must_fit_the_autoencoder(tmp_path):
    save_vae(tmp_path / "vae")
    with pytest.raises(UserError, match="`resolution` 18 is not divisible"):
        run(complexity, "--dataset_name digits --image_channels 1 --resolution 18", vae=tmp_path / "vae")


# The processes


def test_processes_of_a_launcher_work_alone(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}.items():
        monkeypatch.setenv(name, value)
    assert not work_alone()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6" and not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(os.environ)
    assert work_alone() and os.environ["CUDA_VISIBLE_DEVICES"] == "6"


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("", ""), ("-1", "-1"), ("0", ConfigError)])
def test_processes_of_a_launcher_see_the_gpus_that_they_may(visible, own, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": visible}
    for name, value in given.items():
        monkeypatch.setenv(name, value) if value is not None else None
    if own is ConfigError:
        with pytest.raises(ConfigError, match="more processes were started than `CUDA_VISIBLE_DEVICES` 0 has GPUs"):
            work_alone()
    else:
        work_alone()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_pilots_keep_their_latents_while_others_in_the_folder_end(measured, tmp_path, monkeypatch):
    vae, features, _, rows = measured
    train, other = pilots.train_generator, compose(ComplexityConfig, **changes_of(TINY) | {"widths": [8]})

    def train_after_others(*given, **more):
        monkeypatch.setattr(pilots, "train_generator", train)
        measure_pilots(vae, DATA, other, tmp_path, features=features)
        return train(*given, **more)

    monkeypatch.setattr(pilots, "train_generator", train_after_others)
    ladder = compose(ComplexityConfig, **changes_of(TINY) | {"widths": [16]})
    with launched_here():
        (row,) = measure_pilots(vae, DATA, ladder, tmp_path, features=features)
    assert distances([row]) == pytest.approx(distances(rows[:1] if rows[0]["width"] == 16 else rows[1:]))


def wait_for(condition, log) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "nothing was written"
        time.sleep(0.1)


def test_script_runs_in_a_process_of_its_own_which_ends_with_the_one_that_started_it(tmp_path):
    flags = {**DATA, "block_out_channels": [8, 8], "norm_num_groups": 4, "train_batch_size": 4, "logging_steps": 1}
    flags |= {"auxiliary_decoder": "none", "stage1_steps": 1, "stage2_steps": 1, "resume_from_checkpoint": "latest"}

    def launch_three():
        assert launch_script("train_dae", {**flags, "output_dir": tmp_path / "a"})["cpu_seconds"] > 0
        with pytest.raises(ScriptError, match="train-dae failed: unknown flag `--stage1_stpes`. Did you mean"):
            launch_script("train_dae", {"stage1_stpes": 1, "output_dir": tmp_path / "b"})
        (tmp_path / "both").touch()
        launch_script("train_dae", {**flags, "stage1_steps": 20000, "output_dir": tmp_path / "c"})

    process = in_child(launch_three, wait=False)
    log = tmp_path / "c" / "train_dae" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, tmp_path / "a" / "train_dae.txt")
    assert (tmp_path / "both").exists() and (tmp_path / "a" / "vae").is_dir()
    assert "saved" in (tmp_path / "a" / "train_dae.txt").read_text()
    os.kill(process, signal.SIGKILL)  # the script saves and ends
    os.waitpid(process, 0)
    checkpoints = tmp_path / "c" / "train_dae" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("checkpoint-*")), tmp_path / "c" / "train_dae.txt")


def test_a_killed_process_leaves_its_job_to_the_others(tmp_path):
    def work(name: str) -> None:
        time.sleep(99 if name == "slow" and not (tmp_path / "begun").exists() else 0)
        (tmp_path / name).touch()

    def begin(name: str) -> None:
        (tmp_path / "begun").touch() if name == "fast" else None
        work(name)

    process = in_child(lambda: share(["slow"], tmp_path, lambda name: (tmp_path / name).exists(), work), wait=False)
    while not (tmp_path / "claims" / "slow" / ".owner").exists():
        time.sleep(0.05)
    assert not (tmp_path / "slow").exists()
    share(["fast"], tmp_path, lambda name: (tmp_path / name).exists(), begin)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    share(["slow", "fast"], tmp_path, lambda name: (tmp_path / name).exists(), begin)
    assert (tmp_path / "slow").exists()
