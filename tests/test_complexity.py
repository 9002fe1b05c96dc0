"""The laws of the complexity distance, on the embedded digits and on latents whose answer is known."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from models import make_autoencoder, save_backbone
from scripts import launch, run, succeed

from dae_diffusers.cli import parse_config
from dae_diffusers.complexity.distance import complexity_distance, encode, measure_complexity
from dae_diffusers.complexity.report import plot_complexity
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.complexity.task import ComplexityTask
from dae_diffusers.data import DataConfig, load_images, make_pass_loader
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.settings import compose
from dae_diffusers.training import complexity
from dae_diffusers.training.settings import MeasureComplexityConfig

PAIRED = ComplexityConfig(forms=("paired",), capacities=(0, 8), seeds=(0,), paired_steps=80)
UNPAIRED = ComplexityConfig(forms=("unpaired",), capacities=(0,), seeds=(0,), unpaired_steps=60, evaluation_steps=80)
TINY = ComplexityConfig(
    capacities=(0, 2), seeds=(0, 1), batch_size=8, paired_steps=3, unpaired_steps=2, evaluation_steps=2, critic_width=4
)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,200 and 297 digits of 8x8 pixels."""
    splits = load_images(DataConfig(dataset_name="digits", image_channels=1, resolution=8), seed=0)
    train, test = [torch.stack([split[n]["pixel_values"] for n in range(len(split))]) for split in splits]
    return train[:1200], test


def latents_of(images: torch.Tensor) -> torch.Tensor:
    """An invertible, strongly nonlinear code of 4 channels at half the resolution."""
    latents = F.pixel_unshuffle(images, 2)
    return latents + 0.9 * torch.sin(3 * latents.flip(1))


def measure(config: ComplexityConfig, latents: list[torch.Tensor], images, **kwargs) -> dict[int, dict]:
    result = measure_complexity(latents[0], images[0], latents[1], images[1], config, disable_progress=True, **kwargs)
    return {entry["capacity"]: entry for entry in result.summary}


def test_images_as_latents_leave_nothing(digits):
    for latents in (list(digits), [F.pixel_unshuffle(part, 4) for part in digits]):
        paired = measure(PAIRED, latents, digits)
        assert paired[0]["variance_left"] < 1e-6
        assert paired[8]["variance_left"] < 5e-3


def test_noise_as_latents_leaves_the_variance_of_the_data(digits):
    latents = [torch.randn(len(part), 4, 4, 4) for part in digits]
    paired = measure(PAIRED, latents, digits)
    position = digits[0].mean(dim=0)  # the best that can be said without information, but for translation
    ceiling = (digits[1] - digits[0].mean()).square().mean()
    assert paired[0]["mse"] == pytest.approx(ceiling.item(), rel=0.35)
    assert paired[0]["mse"] >= (digits[1] - position).square().mean().item() * 0.95
    assert paired[8]["mse"] >= (digits[1] - position).square().mean().item() * 0.95


def test_linear_maps_of_the_latents_change_nothing(digits):
    latents = [latents_of(part) for part in digits]
    matrix = torch.tensor([[1.0, 2, 0, 0], [0, 0.5, 0, 1], [3, 0, -1, 0], [0, 1, 1, 1]])
    mapped = [torch.einsum("kc,nchw->nkhw", matrix, part) * 30 + 5 for part in latents]
    before, after = measure(PAIRED, latents, digits), measure(PAIRED, mapped, digits)
    assert after[0]["mse"] == pytest.approx(before[0]["mse"], rel=1e-4)
    # A wider one starts from other weights in effect, so only about the same.
    assert after[8]["mse"] == pytest.approx(before[8]["mse"], rel=0.25)


def test_shuffling_destroys_only_the_paired_form(digits):
    latents = [latents_of(part) for part in digits]
    shuffled = [part[torch.randperm(len(part))] for part in latents]
    position = (digits[1] - digits[0].mean(dim=0)).square().mean().item()  # all that shuffled latents tell
    assert measure(PAIRED, latents, digits)[0]["mse"] < 0.7 * position
    assert measure(PAIRED, shuffled, digits)[0]["mse"] > 0.95 * position
    kept, lost = measure(UNPAIRED, latents, digits), measure(UNPAIRED, shuffled, digits)
    assert lost[0]["std_left"] == pytest.approx(kept[0]["std_left"], abs=0.1)


def test_capacity_never_hurts(digits):
    config = ComplexityConfig(forms=("paired",), capacities=(0, 4, 16), seeds=(0, 1), paired_steps=120)
    paired = measure(config, [latents_of(part) for part in digits], digits)
    assert paired[4]["variance_left"] < paired[0]["variance_left"]
    assert paired[16]["variance_left"] < paired[4]["variance_left"]


def test_linear_generator_is_the_least_squares_solution(digits):
    """Against numpy on explicit 3x3 neighbourhoods."""
    latents = [latents_of(part) for part in digits]
    pixels = [F.pixel_unshuffle(part, 2).flatten(2).transpose(1, 2).flatten(0, 1).double() for part in digits]
    # Outside the grid the generator sees whitened zeros, that is the mean.
    mean = latents[0].mean(dim=(0, 2, 3), keepdim=True)
    patches = [F.unfold(part - mean, 3, padding=1).transpose(1, 2).flatten(0, 1).double() for part in latents]
    patches = [torch.cat([part, torch.ones(len(part), 1)], dim=1) for part in patches]
    solution = torch.linalg.lstsq(patches[0], pixels[0]).solution
    expected = (patches[1] @ solution - pixels[1]).square().mean().item()
    assert measure(PAIRED, latents, digits)[0]["mse"] == pytest.approx(expected, rel=1e-4)


def test_unpaired_form_finds_a_difference_and_its_absence(digits):
    """The images themselves against images that all have one brightness less."""
    config = ComplexityConfig(forms=("unpaired",), capacities=(0,), seeds=(0,), unpaired_steps=1, evaluation_steps=150)
    same = [part.clone() for part in digits]
    darker = [part - 0.5 * (part + 1) for part in digits]
    left = {}
    for name, decoded in (("same", same), ("darker", darker)):
        entries = measure(config, list(digits), digits, reconstruction_train=decoded[0], reconstruction_eval=decoded[1])
        left[name] = entries[None]["wasserstein"]
    paired = (0.5 * (digits[1] + 1)).square().mean().sqrt().item()
    assert abs(left["same"]) < 0.05
    assert 0.3 * paired < left["darker"] < 1.05 * paired  # never above the distance of the pairs


def test_decoder_is_compared(digits):
    latents = [latents_of(part) for part in digits]
    decoded = [part * 0.9 for part in digits]
    paired = measure(PAIRED, latents, digits, reconstruction_train=decoded[0], reconstruction_eval=decoded[1])
    assert paired[None]["mse"] == pytest.approx(0.01 * digits[1].square().mean().item(), rel=1e-4)
    assert paired[0]["mse_difference"] == pytest.approx(paired[0]["mse"] - paired[None]["mse"])
    assert paired[0]["mse_ratio"] == pytest.approx(paired[0]["mse"] / paired[None]["mse"])


def test_same_inputs_same_rows_and_random_state_untouched(digits):
    latents = [latents_of(part)[:100] for part in digits]
    images = [part[:100] for part in digits]
    state = torch.get_rng_state()
    first, second = measure(TINY, latents, images), measure(TINY, latents, images)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert first[2]["std_left_std"] > 0


def test_finished_rows_are_not_repeated(digits, tmp_path, monkeypatch):
    latents, images = [latents_of(part)[:100] for part in digits], [part[:100] for part in digits]
    path = tmp_path / "rows.jsonl"
    whole = measure(TINY, latents, images, rows_path=path)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    path.write_text("".join(lines[:3]) + lines[3][:40])  # stopped while it wrote
    assert measure(TINY, latents, images, rows_path=path) == whole
    assert len(path.read_text().splitlines()) == 8

    monkeypatch.setattr(ComplexityTask, "train", None)
    assert measure(TINY, latents, images, rows_path=path) == whole
    with pytest.raises(TypeError):  # other latents are other rows
        measure(TINY, [latents[0] * 2, latents[1]], images, rows_path=path)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_any_autoencoder_and_a_plot(kind, tmp_path):
    if kind == "kl":
        vae = make_autoencoder(in_channels=1, out_channels=1).to_diffusers().eval()
    else:
        vae = VQModel(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4).eval()
    splits = load_images(DataConfig(dataset_name="digits", image_channels=1, resolution=16), seed=0)
    loaders = [make_pass_loader(split, batch_size=20) for split in splits]
    result = complexity_distance(vae, *loaders, TINY, max_train_images=50, max_eval_images=30, disable_progress=True)
    assert (result.num_train_images, result.num_eval_images) == (50, 30)
    assert {row.capacity for row in result.rows} == {0, 2, None}
    assert json.loads(json.dumps(result.to_dict()))["image_shape"] == [1, 16, 16]
    plot_complexity({kind: result}, tmp_path / "complexity.png")
    assert (tmp_path / "complexity.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latents_train": torch.zeros(10, 4, 4, 4)}, "collapsed"),
        ({"latents_train": torch.full((10, 4, 4, 4), torch.nan)}, "NaN"),
        ({"latents_train": torch.randn(9, 4, 4, 4)}, "9 rows"),
        ({"latents_eval": torch.randn(10, 3, 4, 4)}, "must be the same"),
        ({"pixel_values_train": torch.rand(10, 1, 8, 8) * 255}, r"\[-1, 1\]"),
        ({"pixel_values_train": torch.zeros(10, 1, 8, 8)}, "constant"),
        ({"latents_train": torch.randn(10, 4, 3, 3), "latents_eval": torch.randn(10, 4, 3, 3)}, "whole factor"),
        ({"reconstruction_train": torch.zeros(10, 1, 8, 8)}, "both of"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    arguments = {
        "latents_train": torch.randn(10, 4, 4, 4),
        "pixel_values_train": torch.rand(10, 1, 8, 8),
        "latents_eval": torch.randn(10, 4, 4, 4),
        "pixel_values_eval": torch.rand(10, 1, 8, 8),
    }
    with pytest.raises(ValueError, match=sentence):
        measure_complexity(**{**arguments, **change}, config=TINY, disable_progress=True)


@pytest.mark.parametrize("change", [{"capacities": ()}, {"capacities": (-1,)}, {"forms": ("both",)}, {"seeds": (0, 0)}])
def test_bad_config_is_refused(change):
    with pytest.raises(ValueError):
        ComplexityConfig(**change)


def test_damaged_rows_are_refused(digits, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 of"):
        measure(TINY, [latents_of(part) for part in digits], digits, rows_path=path)


# The script


@pytest.fixture
def vae_folder(tmp_path):
    make_autoencoder("none", in_channels=1, out_channels=1).to_diffusers().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


FLAGS = "--dataset_name digits --image_channels 1 --resolution 16"


def test_script_measures_draws_and_goes_on(vae_folder, tmp_path):
    features = save_backbone(tmp_path, "classifier")
    flags = FLAGS + " --capacities 0 --seeds 1 --unpaired_steps 3 --evaluation_steps 3"
    folders = {"vae": vae_folder, "features": features, "output_dir": tmp_path / "complexity"}
    succeed(launch("complexity", flags, **folders))
    result = json.loads((tmp_path / "complexity" / "complexity.json").read_text())
    assert {(row["form"], row["capacity"]) for row in result["summary"]} == {
        ("paired", 0), ("paired", None), ("unpaired", 0), ("unpaired", None)
    }  # fmt: skip
    assert all(row["seed"] == 1 and row["values"]["frechet_distance"] >= 0 for row in result["rows"])
    assert result["image_shape"] == [1, 16, 16] and result["config"]["evaluation_steps"] == 3
    assert (tmp_path / "complexity" / "complexity.png").stat().st_size > 5000
    report = (tmp_path / "complexity" / "complexity.md").read_text()
    assert "### Complexity distance, paired\n| capacity | seeds | variance_left |" in report and "the decoder" in report
    rows = (tmp_path / "complexity" / "complexity.jsonl").read_text()
    run(complexity, flags, **folders)
    assert (tmp_path / "complexity" / "complexity.jsonl").read_text() == rows
    assert json.loads((tmp_path / "complexity" / "complexity.json").read_text()) == result


def test_script_depends_on_no_batch_size_and_its_errors_are_the_users(vae_folder, tmp_path, monkeypatch):
    sizes = []

    def measure(vae, train_loader, eval_loader, config, **kwargs):
        sizes.extend([train_loader.batch_size, eval_loader.batch_size])
        raise ValueError("`latents_train` is constant.")

    monkeypatch.setattr(complexity, "complexity_distance", measure)
    with pytest.raises(UserError, match="cannot be measured: `latents_train` is constant"):
        run(complexity, FLAGS + " --batch_size 7", vae=vae_folder, output_dir=tmp_path / "complexity")
    assert sizes == [64, 64]


def test_latents_do_not_depend_on_the_batch_size(image_folder):
    images = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16, validation_fraction=0.5))[0]
    vae = make_autoencoder("none").to_diffusers()
    encoded = [
        encode(vae, make_pass_loader(images, batch_size=size), 100, "images", "cpu", True) for size in (1, 7, 64)
    ]
    assert [len(tensor) for tensor in encoded[0]] == [len(images)] * 3
    for other in encoded[1:]:
        assert all(torch.equal(a, b) for a, b in zip(encoded[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seeds": []}, "`seeds` is"),
        ({"capacities": [-1]}, "`capacities`"),
        ({"seed": -1}, "`seed` is -1"),
        ({"streaming": True}, "`streaming`"),
        ({"features": "x", "image_channels": 4}, "not 4 channels"),
        ({"dataset_name": None}, "`dataset_name`"),
    ],
)
def test_flags_are_checked(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose(MeasureComplexityConfig, **{"vae": "x", "dataset_name": "digits", **change})


def test_autoencoder_is_asked_for(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(MeasureComplexityConfig, ["--dataset_name", "digits"])
    assert exit_info.value.code == 2 and "--vae" in capsys.readouterr().err
