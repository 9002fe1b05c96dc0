"""The benchmark of the claim: what it trains, what it does not repeat, and its statistics against scipy's."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from models import save_backbone, save_run
from safetensors.torch import load_file, save_file
from scripts import launched_here, load_benchmark

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.cli import parse_config
from dae_diffusers.comparison.scripts import words_of
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.metrics.features import PixelFeatures, SpectrumFeatures
from dae_diffusers.search.candidates import read_candidates
from dae_diffusers.search.settings import SearchConfig
from dae_diffusers.training.settings import TrainDAEConfig, TrainDiTConfig

EXPERIMENTS = Path(__file__).parents[1] / "benchmarks" / "experiments"
RESULTS = EXPERIMENTS.with_name("results")
EXPERIMENT = {
    "data": {"dataset_name": "digits", "resolution": 16},
    "num_images": 12,
    "num_inference_steps": 1,
    "guidance_scales": [1.0, 1.5],
    "judges": ["pixels", "spectrum"],
    "seeds": [0],
    "autoencoder": {
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "latent_channels": 3,
        "train_batch_size": 4,
        "lr_warmup_steps": 0,
    },
    "budgets": {
        "time": {
            "joint": {"stage1_steps": 1, "stage2_steps": 2},
            "decoupled": {"stage1_steps": 2, "stage2_steps": 2},
        },
        "steps": {
            "joint": {"stage1_steps": 1, "stage2_steps": 2},
            "decoupled": {"stage1_steps": 1, "stage2_steps": 2},
        },
    },
    "transformer": {
        "model": "DiT-Ti/2",
        "num_layers": 1,
        "attention_head_dim": 8,
        "max_train_steps": 1,
        "train_batch_size": 4,
    },
    "generators": {"narrow": {"num_attention_heads": 1}, "wide": {"num_attention_heads": 2}},
    "conditions": {
        "joint": {"auxiliary_decoder": "none"},
        "same": {"auxiliary_decoder": "same", "generators": ["narrow"]},
        "linear": {"auxiliary_decoder": "linear", "budgets": ["time"], "generators": ["narrow"]},
        "warm": {
            "latents_of": "same",
            "auxiliary_decoder": "same",
            "warm_start_decoder": True,
            "budgets": ["time"],
            "generators": ["narrow"],
        },
        "more": {
            "decoder_of": "warm",
            "stage2_steps": 3,
            "mse_weight": 0.0,
            "budgets": ["time"],
            "generators": ["narrow"],
        },
        "stage3": {
            "fit_of": "more",
            "stage3_steps": 1,
            "generated_loss": "adversarial",
            "discriminator_layers": 2,
            "pool_size": 4,
            "max_psnr_drop": 99,
            "budgets": ["time"],
            "generators": ["narrow"],
        },
    },
}


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("decoupled_vs_joint")


@pytest.fixture(scope="module")
def tables():
    return load_benchmark("claim_tables")


@pytest.fixture
def launched(benchmark):
    """The scripts run in this process; their names and output folders are counted."""
    with launched_here() as calls:
        yield calls


@pytest.mark.filterwarnings("ignore:.*covariance is singular", "ignore:.*is larger than the data set")
def test_benchmark_trains_each_run_once_and_writes_tables(benchmark, launched, image_folder, tmp_path, monkeypatch):
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"features": {}}, sort_keys=False))
    command = [
        "benchmark", "--experiment", f"{tmp_path}/experiment.yaml", "--output_dir", f"{tmp_path}/claim",
        "--features", save_backbone(tmp_path / "backbone", "classifier"), "--decoder_steps", "1",
        "--data", f"train_data_dir={image_folder}", "validation_fraction=0.5",
    ]  # fmt: skip
    claim_command = command
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main(benchmark.parse_arguments())

    folders = [
        str(Path(folder).relative_to(tmp_path / "claim")).removesuffix("/narrow")
        for name, folder in launched
        if name == "train_dae"
    ]
    assert sorted(folders) == sorted(
        f"{condition}/{steps}/seed-0"
        for condition, all_steps in {
            "joint": ["3", "3+1"],
            "same": ["2+2", "2+2+1", "1+2", "1+2+1"],
            "linear": ["2+2", "2+2+1"],
            "warm": ["2+2", "2+2+1"],
            "more": ["2+2+3", "2+2+3+1"],
            "stage3": ["2+2+3+1"],
        }.items()
        for steps in all_steps
    )
    assert sum(name == "train_dit" for name, _ in launched) == 5
    assert not list((tmp_path / "claim").rglob("latents"))
    rows = json.loads((tmp_path / "claim" / "results.json").read_text())
    assert {(row["condition"], row["steps"], row["generator"]) for row in rows} == {
        *(("joint", steps, size) for steps in ("3", "3+1") for size in ("narrow", "wide")),
        *(("same", steps, "narrow") for steps in ("2+2", "2+2+1", "1+2", "1+2+1")),
        *((condition, steps, "narrow") for condition in ("linear", "warm") for steps in ("2+2", "2+2+1")),
        *(("more", steps, "narrow") for steps in ("2+2+3", "2+2+3+1")),
        ("stage3", "2+2+3+1", "narrow"),
    }
    # The same latents and transformer, other decoders.
    first, longer, warm, more, fitted = (
        next(row for row in rows if (row["condition"], row["steps"], row["generator"]) == (*which, "narrow"))
        for which in (("same", "2+2"), ("same", "2+2+1"), ("warm", "2+2"), ("more", "2+2+3"), ("stage3", "2+2+3+1"))
    )
    for other in (longer, warm, more, fitted):
        assert first["latent_space"]["std"] == other["latent_space"]["std"]
        assert first["validation_loss"] == other["validation_loss"]
        assert first["reconstruction"] != other["reconstruction"] and first["generation"] != other["generation"]
    assert more["autoencoder_cost"]["flops"] > longer["autoencoder_cost"]["flops"] > first["autoencoder_cost"]["flops"]
    flags = yaml.safe_load((tmp_path / "claim" / "more" / "2+2+3" / "seed-0" / "train_dae" / "config.yaml").read_text())
    assert flags["pretrained_model_name_or_path"].endswith("warm/2+2/seed-0/vae") and flags["mse_weight"] == 0
    assert warm["autoencoder_cost"] == first["autoencoder_cost"]
    assert fitted["autoencoder_cost"]["cpu_seconds"] == more["autoencoder_cost"]["cpu_seconds"] + 1
    judged = fitted["judged"]
    assert judged.keys() == {"1.0", "1.5"} and {"pixels", "spectrum"} < judged["1.0"].keys()
    assert judged["1.0"] != more["judged"]["1.0"]
    # The first judge is the features of the table's gFD; the same noise gives the same samples.
    gfd = next(value for name, value in more["generation"].items() if name.startswith("gfd"))
    assert next(iter(more["judged"]["1.0"].values())) == pytest.approx(gfd, rel=0.02)
    text = (tmp_path / "claim" / "results.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert [title.partition(" (")[0] for title in titles] == [
        f"## Budget `{budget}`, generator `{size}`"
        for budget in ("time", "time+1", "steps", "steps+1")
        for size in ("narrow", "wide")
    ]
    assert "too few seeds" in text
    # `warm` and `more` have the latents and the transformer of `same`: they are no runs of their own.
    counted = re.findall(r"rank correlation with gFD over (\d+) runs and the means of (\d+) conditions", text)
    assert counted == [(number, number) for number in "31312121"]
    assert len(list((tmp_path / "claim").glob("frontier-*.png"))) == 4
    assert len(list((tmp_path / "claim").glob("sizes-*.png"))) == 4

    assert "| condition | 0 |" not in text  # one seed: the means are the runs

    launched.clear()
    benchmark.main(benchmark.parse_arguments())
    assert launched == []
    assert (tmp_path / "claim" / "results.md").read_text() == text

    # Pilots on the autoencoders of the finished runs.
    forecast = load_benchmark("forecast")
    command = ["forecast", "--runs", f"{tmp_path}/claim", "--output_dir", f"{tmp_path}/forecast", "--limit", "3"]
    command += ["--generator", "narrow", "--widths", "8", "--steps", "1", "2", "--num_images", "12"]
    monkeypatch.setattr(sys, "argv", command)
    with launched_here() as pilots:
        forecast.main(forecast.parse_arguments())
        assert [name for name, _ in pilots] == ["cache_latents", "train_dit", "train_dit"] * 3
        table = (tmp_path / "forecast" / "forecast.md").read_text()
        assert "### claim: 3 runs" in table and "| pilot gFD, width 8, 2 steps | " in table and "| forecast | " in table
        forecast.main(forecast.parse_arguments())
        assert len(pilots) == 9 and (tmp_path / "forecast" / "forecast.md").read_text() == table
    monkeypatch.setattr(sys, "argv", claim_command)

    # Another experiment must not take these runs for its own; a condition that is no longer in it is left out.
    other = EXPERIMENT | {"features": {}, "num_images": 13}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    with pytest.raises(UserError, match="holds runs of another experiment: `num_images` was 12 and is 13"):
        benchmark.main(benchmark.parse_arguments())
    conditions = {name: options for name, options in EXPERIMENT["conditions"].items() if name != "linear"}
    fewer = EXPERIMENT | {"features": {}, "conditions": conditions}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(fewer, sort_keys=False))
    benchmark.main(benchmark.parse_arguments())
    assert "linear" not in (tmp_path / "claim" / "results.md").read_text()
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"features": {}}, sort_keys=False))

    # A judge that does not exist is named before anything is trained.
    lacking = EXPERIMENT | {"features": {}, "judges": ["pixels", "runs/rotations"]}
    (tmp_path / "lacking.yaml").write_text(yaml.safe_dump(lacking, sort_keys=False))
    arguments = benchmark.parse_arguments()
    arguments.experiment, arguments.output_dir = lacking, tmp_path / "lacking"
    with pytest.raises(UserError, match="runs/rotations.* The experiment's file says how to make it"):
        benchmark.main(arguments)
    assert launched == []

    # Interrupted after the autoencoder was saved, before its cost was.
    folder = tmp_path / "claim" / "linear" / "2+2" / "seed-0"
    for name in ("cost", "autoencoder"):
        (folder / f"{name}.json").unlink()
    benchmark.main(benchmark.parse_arguments())
    assert launched == [("train_dae", str(folder))]
    assert (tmp_path / "claim" / "results.md").read_text() == text

    # Other weights under the same name are another ruler.
    weights = tmp_path / "backbone" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="were judged by other weights of .*backbone"):
        benchmark.main(benchmark.parse_arguments())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--experiment nowhere.yaml", "nowhere.yaml does not exist"),
        ("--experiment {experiment} --conditions jonit", "unknown conditions ['jonit']; the experiment has ['joint'"),
        ("--experiment {experiment} --data resolutoin=32", "unknown field `resolutoin`. Did you mean `resolution`?"),
        ("--experiment {experiment} --data resolution=wide", "argument --resolution: invalid int value: 'wide'"),
        ("--experiment {other}", "has no ['features', 'transformer']"),
        ("--experiment {compared}", "`baselines` of linear are ['joint'], but must be two conditions"),
        ("--experiment {empty}", "must hold `flag: value` lines, but holds a NoneType"),
        ("--experiment {experiment} --data random_flip", "`--data` takes FLAG=VALUE, not ['random_flip']"),
    ],
)
def test_wrong_flags_are_named(benchmark, flags, message, tmp_path, monkeypatch, capsys):
    whole = EXPERIMENT | {"features": "backbone"}
    experiments = {
        "experiment": whole,
        "other": {name: value for name, value in whole.items() if name not in ("features", "transformer")},
        "compared": whole | {"conditions": {"joint": {}, "linear": {"baselines": ["joint"]}}},
        "empty": None,
    }
    for name, experiment in experiments.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(experiment))
    words = flags.format(**{path.stem: path for path in tmp_path.glob("*.yaml")}).split()
    monkeypatch.setattr(sys, "argv", ["benchmark", "--output_dir", f"{tmp_path}/claim", *words])
    with pytest.raises(SystemExit) as exit_info:
        benchmark.parse_arguments()
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def give(monkeypatch, folder: Path, *flags: str) -> None:
    """The experiment in a file of the folder, on the command line with some flags."""
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    command = ["--experiment", f"{folder}/experiment.yaml", "--output_dir", f"{folder}/claim", *flags]
    monkeypatch.setattr(sys, "argv", ["benchmark", *command])


def test_features_are_tried_before_anything_is_trained(benchmark, launched, tmp_path, monkeypatch):
    give(monkeypatch, tmp_path, "--features", "no/model")
    with pytest.raises(UserError, match="'no/model' cannot be loaded"):
        benchmark.main(benchmark.parse_arguments())
    assert launched == []


def test_data_flags_replace_those_of_the_experiment(benchmark):
    choose_data = benchmark.choose_data
    data = {"dataset_name": "digits", "image_channels": 1, "resolution": 16}
    assert choose_data([], data) == data
    assert choose_data(["resolution=32", "dataset_name=my/data"], data | {"dataset_config_name": "full"}) == data | {
        "dataset_name": "my/data",
        "resolution": 32,
    }
    assert choose_data(["train_data_dir=a=b", "label_column=no", "image_channels=03", "random_flip=on"], data) == {
        "train_data_dir": "a=b",
        "image_channels": 3,
        "resolution": 16,
        "label_column": "no",
        "random_flip": True,
    }
    for words, message in {
        "resolutoin=32": "unknown field `resolutoin`. Did you mean `resolution`?",
        "label_column=[a": "`--data` cannot be read",
    }.items():
        with pytest.raises(ConfigError, match=message):
            choose_data([words], data)


@pytest.mark.parametrize("num_seeds", range(2, 17))
def test_intervals_are_those_of_the_paired_t_test(tables, num_seeds):
    random = np.random.default_rng(num_seeds)
    a, b = random.normal(3, 1, num_seeds), random.normal(2, 1, num_seeds)
    runs = {
        "dropout": {seed: {"gFD": value} for seed, value in enumerate(a)} | {99: {"gFD": 1e9}},
        "joint": {seed: {"gFD": value} for seed, value in enumerate(b)} | {98: {"gFD": -1e9}},
    }
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    mean, low, high = tables.paired_difference(runs, "dropout", "joint", "gFD")
    assert [mean, low, high] == pytest.approx([(a - b).mean(), expected.low, expected.high], abs=1e-3)


def test_rank_correlations_are_scipys(tables):
    random = np.random.default_rng(0)
    z = random.normal(size=20)
    x, y = z + random.normal(size=20), z + random.normal(size=20)
    assert tables.rank_correlation(list(x), list(y)) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    tied = x.round()
    assert len(set(tied)) < 10
    assert tables.rank_correlation(list(tied), list(y)) == pytest.approx(scipy.stats.spearmanr(tied, y).statistic)
    ranks = [scipy.stats.rankdata(values) for values in (x, y, z)]
    rest = [values - np.polyval(np.polyfit(ranks[2], values, 1), ranks[2]) for values in ranks[:2]]
    correlations = [tables.rank_correlation(list(a), list(b)) for a, b in ((x, y), (x, z), (y, z))]
    assert tables.partial_correlation(*correlations) == pytest.approx(np.corrcoef(*rest)[0, 1])


def test_success_needs_both_baselines(tables):
    def of(*values):
        return {seed: {"gFD": value, "gap": value} for seed, value in enumerate(values)}

    runs = {"joint": of(5, 6, 7), "same": of(4.9, 5.9, 7.1), "better": of(3, 4, 5.1), "half": of(4.0, 4.9, 7.3)}
    conditions = dict.fromkeys(runs, {})
    lines = tables.table_of_differences(runs, {"conditions": conditions})[4:]
    assert [line.split("|")[-2].strip() for line in lines] == ["", "", "yes", "no"]
    # Against others the same condition fails.
    runs |= {"joint-c8": of(2, 3, 4), "same-c8": of(9, 9, 9)}
    conditions = dict.fromkeys(runs, {}) | {"better": {"baselines": ["joint-c8", "same-c8"]}}
    lines = tables.table_of_differences(runs, {"conditions": conditions})[4:]
    assert [line.split("|")[-2].strip() for line in lines[:4]] == ["", "", "no", "no"]
    assert lines[-1] == "Here `better` is compared with `joint-c8` and `same-c8`."


@pytest.mark.parametrize(("condition", "base"), [("warm", "same"), ("more", "warm"), ("stage3", "more")])
def test_what_a_condition_goes_on_from_must_be_finished(benchmark, launched, condition, base, tmp_path, monkeypatch):
    features = save_backbone(tmp_path / "backbone", "classifier")
    give(monkeypatch, tmp_path, "--features", features, "--conditions", condition, "--generators", "narrow")
    with pytest.raises(
        UserError, match=rf"`{condition}` continues runs that are not finished: .*/{base}/2\+2(\+3)?/seed-0, "
    ):
        benchmark.main(benchmark.parse_arguments())
    assert launched == []


def test_no_run_means_no_correlations(tables):
    assert tables.table_of_correlations({}) == []


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10_16px", "cifar10_16px_gpu"])
def test_every_condition_has_a_look_of_its_own(tables, name):
    experiment = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    styles = tables.styles_of(experiment)
    assert list(styles) == list(experiment["conditions"])
    assert len(set(styles.values())) == len(styles)
    assert styles["joint"][0] == "C0" and styles["same"][0] == "C1"


@pytest.mark.parametrize("name", ["digits", "cifar10_16px", "cifar10_16px_gpu", "cifar10_16px_branch"])
def test_published_tables_are_those_of_the_published_runs(tables, name):
    experiment = yaml.safe_load((EXPERIMENTS / f"{name.removesuffix('_branch')}.yaml").read_text())
    text = tables.summarize(tables.read_runs(RESULTS / f"{name}.csv"), experiment)
    assert text.strip() in (RESULTS / f"{name}.md").read_text()


def test_table_of_settings_is_that_of_the_published_runs(monkeypatch, capsys, tables):
    monkeypatch.setattr(sys, "argv", ["claim_tables.py"])
    tables.main(tables.parse_arguments())
    assert capsys.readouterr().out in (RESULTS / "README.md").read_text()


def test_runs_are_kept_exactly(tables, tmp_path):
    runs = tables.read_runs(RESULTS / "digits.csv")
    assert {type(value) for run in runs for value in run.values()} == {str, int, float}
    tables.write_runs(runs, tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text() == (RESULTS / "digits.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere.csv"], "go together"), (["no.csv", "--experiment", "no.yaml"], "no.csv is not a file")],
)
def test_tables_need_runs_and_their_experiment(tables, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claim_tables.py", *words])
    with pytest.raises(SystemExit):
        tables.parse_arguments()
    assert message in capsys.readouterr().err


def test_gans_on_noise_latents_and_a_prior(tmp_path, monkeypatch, image_folder, capsys):
    """Each is trained once; the same command gives the same table."""
    benchmark = load_benchmark("gan_latents")
    run = save_run(tmp_path / "run", {0: "cat", 1: "dog"})
    command = [
        "gan_latents", "--data", f"train_data_dir={image_folder}", "resolution=16", "--features",
        save_backbone(tmp_path / "backbone", "classifier"), "--output_dir", f"{tmp_path}/gan", "--widths", "2", "4",
        "--seeds", "0", "--steps", "1", "--num_images", "12", "--batch_size", "4", "--sources", "noise",
        f"latents={run / 'pipeline' / 'vae'}", f"prior={run / 'pipeline'}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main(benchmark.parse_arguments())
    text = (tmp_path / "gan" / "results.md").read_text()
    assert [line.split()[1] for line in text.splitlines()[2:5]] == ["noise", "latents", "prior"]
    assert "The other half's own images: " in text
    rows = (tmp_path / "gan" / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 6 and (tmp_path / "gan" / "results.png").exists()
    benchmark.main(benchmark.parse_arguments())
    assert (tmp_path / "gan" / "rows.jsonl").read_text() == rows
    assert (tmp_path / "gan" / "results.md").read_text() == text
    monkeypatch.setattr(sys, "argv", [*command, "--sources", "noise"])
    with pytest.raises(SystemExit):
        benchmark.parse_arguments()
    assert "at least one NAME=FOLDER" in capsys.readouterr().err
    images = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))[0]
    names = [{half.name_of(n) for n in range(len(half))} for half in benchmark.halves(images)]
    assert len(names[0]) == len(names[1]) == len(images) // 2 and not names[0] & names[1]


def test_damaged_kept_rows_are_removed_and_those_of_others_refused(tmp_path, caplog):
    rows = load_benchmark("experiments.rows")
    path = tmp_path / "new" / "rows.jsonl"
    assert rows.kept_rows(path) == []
    for number in range(4):
        rows.keep_row(path, {"x": number}, f"key{number}")
    whole = path.read_bytes().splitlines(keepends=True)
    assert rows.kept_rows(path) == [(f"key{number}", {"x": number}) for number in range(4)]
    path.write_bytes(
        whole[0] + whole[1].replace(b'"x": 1', b'"x": 5') + b'{"key": "old", "x": 1}\n' + whole[2] + whole[3][:9]
    )
    assert rows.kept_rows(path) == [("key0", {"x": 0}), ("key2", {"x": 2})]
    assert path.read_bytes() == whole[0] + whole[2]
    assert len(caplog.messages) == 1 and "2 of 5 rows" in caplog.text
    path.write_text("a file\nof somebody\n")
    with pytest.raises(UserError, match="line 1 of"):
        rows.kept_rows(path)
    assert path.read_text() == "a file\nof somebody\n"


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of schedulers of diffusers
def test_solvers_are_compared_on_the_same_noise_and_goes_on(image_folder, tmp_path, capsys):
    script = load_benchmark("solvers")
    save_run(tmp_path, {0: "cat", 1: "dog"})
    pipeline = DAEDiTPipeline.from_pretrained(tmp_path / "pipeline")
    for module in (pipeline.transformer.modulation, pipeline.transformer.proj_out):  # which begin as zero
        torch.nn.init.normal_(module.weight, std=0.2)
    pipeline.save_pretrained(tmp_path / "pipeline")
    arguments = Namespace(
        pipeline=tmp_path / "pipeline", dataset_name=None, train_data_dir=str(image_folder), num_images=12,
        features=save_backbone(tmp_path / "judge", "classifier"), output_dir=tmp_path / "solvers",
        guidance_scale=1.5, evaluations=[3, 4], seeds=[0],
    )  # fmt: skip
    script.main(arguments)
    first = json.loads((tmp_path / "solvers" / "solvers.json").read_text())
    text = capsys.readouterr().out
    assert "| Euler, shift 2 |" in text and text.count("**") == 4 and (tmp_path / "solvers" / "solvers.png").exists()
    assert first["Heun"].keys() == {"3", "4"} and not first["Heun"]["4"]  # two calls a step, one in the last
    assert first["Euler"]["3"] != first["Heun"]["3"] != first["UniPC"]["3"]
    del first["UniPC"]["3"]["0"]
    (tmp_path / "solvers" / "solvers.json").write_text(json.dumps(first))
    script.main(arguments)
    assert text in capsys.readouterr().out


def test_recipes_are_compared_by_the_time_to_the_same_quality():
    script = load_benchmark("time_to_quality")
    curve = {"steps": [10, 20, 30], "distances": [8.0, 4.0, 3.0]}
    assert [script.at(curve, step) for step in (10, 15, 30)] == [8.0, 6.0, 3.0]
    assert script.at(curve, 31) is None and script.at(curve, 9) is None
    assert [script.first_at(curve, value) for value in (9, 6.0, 3.0, 2.0)] == [10, 15, 30, None]
    slow = {"steps": [10, 20, 30], "distances": [20.0, 8.0, 6.0]}
    runs = {
        "seconds": {"classic": [0.1, 0.5, 0.1], "ours": [0.2]},
        "curves": {"classic": {"0": slow, "1": slow}, "ours": {"0": curve, "1": curve}},
    }
    assert script.table(runs, "classic").splitlines()[2:] == [
        "| classic | 100 | 6.00 ± 0.00 | 6.00 ± 0.00 | 100 % |",
        "| ours | 200 | 3.00 ± 0.00 | 6.00 ± 0.00 | 100 % |",  # 15 steps of 0.2 s, as 30 of 0.1 s
    ]
    curve["distances"][-1] = 1.0
    assert script.table(runs | {"curves": {"classic": {"0": curve}, "ours": {"0": slow}}}, "classic").endswith(
        "not reached |\n"
    )


@pytest.mark.filterwarnings("ignore:.*larger than the data set")
@pytest.mark.filterwarnings("ignore:.*covariance is singular")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of a scheduler of diffusers
def test_recipes_are_trained_on_the_same_latents(image_folder, tmp_path, monkeypatch, capsys):
    """One with diffusers' transformer, one with ours; a second call trains nothing."""
    script = load_benchmark("time_to_quality")
    monkeypatch.setattr(script, "SHORT", 1)
    monkeypatch.setattr(script, "LONG", 2)
    save_run(tmp_path, {0: "cat", 1: "dog"})
    shared = {
        "model": "DiT-Ti/2",
        "num_layers": 1,
        "num_attention_heads": 1,
        "max_train_steps": 4,
        "train_batch_size": 4,
    }
    experiment = {
        "vae": str(tmp_path / "pipeline" / "vae"),
        "data": {"train_data_dir": str(image_folder), "resolution": 16, "validation_fraction": 0.5},
        "judge": save_backbone(tmp_path / "judge", "classifier"),
        "metric": {"metric_images": 12, "metric_steps": 2, "sample_steps": 1},
        "shared": shared | {"attention_head_dim": 8, "sample_steps": 1, "sample_guidance_interval": [0.0, 1.0]},
        "recipes": {"classic": {"start": "noise"}, "ours": {"optimizer": "muon"}},
        "evaluations": [1, 2],
        "seeds": [0],
        "repeats": 1,
    }
    with launched_here() as started:
        assert script.seconds_of(experiment, "classic", tmp_path / "out", 0) == 0  # each takes a second in this process
    assert len(started) == 2
    (tmp_path / "out" / "runs.json").write_text(
        json.dumps({"seconds": {"classic": [0.1], "ours": [0.1]}, "curves": {}})
    )
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    arguments = Namespace(experiment=tmp_path / "experiment.yaml", output_dir=tmp_path / "out", recipes=None)
    with launched_here() as started:
        script.main(arguments)
    text = capsys.readouterr().out
    assert len(started) == 4 and "| classic |" in text and "| ours |" in text
    assert (
        "| classic, DDPM |" in text and "| ours, UniPCMultistep |" in text and "| recipe, scheduler | 1 | 2 |" in text
    )
    assert (tmp_path / "out/time_to_quality.png").exists() and (tmp_path / "out/evaluations.png").exists()
    transformers = tmp_path.glob("out/*/seed-0/run/pipeline/transformer/config.json")
    assert {json.loads(path.read_text())["_class_name"] for path in transformers} == {
        "DiTTransformer2DModel", "DAEDiTTransformer2DModel",
    }  # fmt: skip
    with launched_here() as started:
        script.main(arguments)
    assert not started and text.endswith(capsys.readouterr().out)


@pytest.mark.parametrize("judge", [PixelFeatures, SpectrumFeatures])
def test_judges_without_a_network_take_gray_images_too(judge):
    gray, colored = (judge(channels)(torch.rand(2, channels, 16, 16)) for channels in (1, 3))
    assert (gray.shape[1], colored.shape[1]) == (judge(1).feature_dim, judge(3).feature_dim)
    assert colored.shape[1] == 3 * gray.shape[1]


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_flags_of_all_experiments_are_those_of_the_scripts(path):
    """What a page of results says was run can still be started."""
    experiment = yaml.safe_load(path.read_text())
    if "candidates" in experiment:
        config = SearchConfig(output_dir="out", candidates=str(path), seed=0)
        assert (
            read_candidates(config, {"dataset_name": "mine", "resolution": 16}).flags.keys()
            == experiment["candidates"].keys()
        )
        return
    flags = []
    for recipe in experiment.get("recipes", {}).values():
        own = {name: value for name, value in recipe.items() if name != "start"}
        flags.append((TrainDiTConfig, {"vae": "vae", **experiment["data"], **experiment["shared"], **own}))
    for name, options in experiment.get("conditions", {}).items():
        if not {"latents_of", "decoder_of", "fit_of"} & options.keys():
            budget = options.get("budgets", list(experiment["budgets"]))[0]
            trial = load_benchmark("experiments.trial").Trial
            flags.append((TrainDAEConfig, trial(experiment, Path("out"), budget, name, 0).autoencoder_flags()))
    for generator in experiment.get("generators", {}).values():
        flags.append((TrainDiTConfig, {"vae": "vae", **experiment["data"], **experiment["transformer"], **generator}))
    assert flags
    for config, given in flags:
        parse_config(config, words_of(given))


def test_picture_of_the_confirmation_has_all_runs_that_it_names(monkeypatch, tmp_path):
    picture = load_benchmark("confirmation_picture")
    for side in picture.SIDES.values():
        for data, named in side.items():
            runs = picture.read_runs(picture.RESULTS / picture.DATA[data])
            assert (
                len(picture.relative(runs, named, picture.BASELINES[data]))
                >= {"CIFAR-10": 2, "digits": 2, "emoji": 1}[data]
            )
    runs = [
        {"condition": name, "generator": "g", "seed": 3, "gFD": gfd, "gFD guidance 2": 3.0}
        for name, gfd in (("a", 2.0), ("b", 4.0))
    ]
    assert picture.relative(runs, ("a", "g"), ("b", "g")) == [2 / 3]
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "picture.png")
    picture.main()
    assert (tmp_path / "picture.png").exists()
