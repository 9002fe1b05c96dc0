"""The search for a latent space: its plan, its rungs, what it survives and what it says."""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from models import save_autoencoder, save_backbone
from safetensors.torch import load_file, save_file
from scripts import in_child, launched_here, load_benchmark, run

from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.locks import FolderLock
from dae_diffusers.metrics import drawings
from dae_diffusers.metrics.checks import check_enough_images
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.search.candidates import read_candidates
from dae_diffusers.search.planning import MIN_STEPS, Rung, Speeds, plan_rungs, plan_winner
from dae_diffusers.search.report import full_commands, not_told_apart
from dae_diffusers.search.search import Search
from dae_diffusers.search.settings import SearchConfig, show_seconds
from dae_diffusers.search.trial import CandidateTrial, closest, distances
from dae_diffusers.search.turned import TURNS
from dae_diffusers.settings import compose
from dae_diffusers.store import read_json, write_json
from dae_diffusers.training import find_latents, train_classifier
from dae_diffusers.training.settings import FindLatentsConfig, TrainClassifierConfig

DATA = {"dataset_name": "digits", "image_channels": 1, "resolution": 16}
DATA |= {"max_train_samples": 48, "max_validation_samples": 24}
CANDIDATES = {
    "autoencoder": {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 3, "train_batch_size": 4},
    "transformer": {
        "model": "DiT-Ti/2", "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "train_batch_size": 4
    },
    "judge": {"train_steps": 1, "hidden_sizes": [8, 8], "depths": [1, 1]},
    "candidates": {
        "joint": {"auxiliary_decoder": "none"},
        "same": {"auxiliary_decoder": "same"},
        "broken": {"auxiliary_decoder": "none", "learning_rate": 1e30, "lr_warmup_steps": 0},
        "coarse": {"auxiliary_decoder": "none", "block_out_channels": [8, 8, 8, 8, 8]},
    },
}  # fmt: skip
# Two rungs; a winner that gets no more than it has had.
PLAN = {
    "speeds": {"autoencoder": 1e9, "generator": 1e9, "fixed": 0},
    "rungs": [Rung(3, 2, 2).to_dict(), Rung(2, 4, 4).to_dict()],
    "seconds": 1.0,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular")


# The plan


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("4h", 14400), ("1d12h", 129600), ("45s", 45)])
def test_budget_is_a_time(text, seconds):
    assert SearchConfig(budget=text).seconds == seconds
    assert SearchConfig(budget=show_seconds(seconds)).seconds == seconds


@pytest.mark.parametrize("text", ["0h", "4", "4 h", "h", "4h and more", "-4h", "1.5h"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ConfigError, match="`budget` is .* but must be a time such as 90m, 4h or 1d12h"):
        SearchConfig(budget=text)


@pytest.mark.parametrize("candidates", [1, 2, 3, 5, 12, 40])
@pytest.mark.parametrize("workers", [1, 3])
def test_choosing_takes_half_of_the_budget_and_each_rung_is_longer(candidates, workers):
    speeds = Speeds(0.02, 0.01, 3.0)
    rungs = plan_rungs(7200, candidates, 3, speeds, workers)
    assert [rung.candidates for rung in rungs] == [
        n for n in (candidates, candidates // 3, candidates // 9, 1) if n > 1
    ][: len(rungs)]
    seconds = sum(
        math.ceil(rung.candidates / min(rung.candidates, workers))
        * (speeds.fixed + rung.autoencoder_steps * speeds.autoencoder + rung.generator_steps * speeds.generator)
        for rung in rungs
    )
    assert not rungs or 3400 < seconds <= 3600
    for shorter, longer in zip(rungs, rungs[1:], strict=False):
        assert longer.autoencoder_steps == 3 * shorter.autoencoder_steps
        assert longer.generator_steps == 3 * shorter.generator_steps


def test_a_budget_that_holds_no_rung_says_the_least_that_does():
    speeds = Speeds(0.02, 0.01, 3.0)
    with pytest.raises(UserError, match="`budget` 30s cannot hold 12 candidates: here they need at least ") as error:
        plan_rungs(30, 12, 3, speeds)
    least = SearchConfig(budget=str(error.value).partition("at least ")[2].partition(".")[0]).seconds
    rungs = plan_rungs(least, 12, 3, speeds)
    assert len(rungs) == 1 and len(plan_rungs(2 * least, 12, 3, speeds)) == 2  # as many as are long enough
    assert min(rungs[0].autoencoder_steps, rungs[0].generator_steps) >= MIN_STEPS
    with pytest.raises(UserError):
        plan_rungs(0.8 * least, 12, 3, speeds)
    with pytest.raises(UserError, match="`budget` 30s cannot hold"):
        plan_rungs(30, 12, 3, speeds, used=100)
    assert plan_rungs(least + 100, 12, 3, speeds, used=100) == rungs


def test_winner_gets_the_rest_and_never_less_than_it_had():
    before = Rung(2, 300, 200)
    assert plan_winner(103, Speeds(0.1, 0.05, 3), before, False) == Rung(1, 1300, 2000)
    assert plan_winner(103, Speeds(0.1, 0.05, 3), before, True) == Rung(1, 800, 1000)
    assert plan_winner(-5, Speeds(0.1, 0.05, 3), before, True) == Rung(1, 300, 200)


# The candidates


def written(folder, content) -> str:
    (folder / "candidates.yaml").write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return str(folder / "candidates.yaml")


def test_candidates_that_do_not_fit_are_left_out_or_stop_the_search(tmp_path):
    path = written(tmp_path, CANDIDATES)
    found = read_candidates(SearchConfig(candidates=path), DATA)
    assert list(found.flags) == ["joint", "same", "broken"]
    assert found.left_out == {"coarse": "latents of 1x1 cannot be cut into patches of 2."}
    with pytest.raises(ConfigError, match="candidate `coarse` does not fit: latents of 1x1"):
        read_candidates(SearchConfig(candidates=path, on_misfit="stop"), DATA)
    with pytest.raises(UserError, match="no candidate fits the images: `resolution` 15 is not divisible by 2"):
        read_candidates(SearchConfig(candidates=path), DATA | {"resolution": 15})


def test_values_of_candidates_have_the_types_of_their_settings(tmp_path):
    text = "{autoencoder: {mixed_precision: no, random_flip: off}, candidates: {a: {kl_weight: 1e-4, latent_channels: 02}}}"
    found = read_candidates(SearchConfig(candidates=written(tmp_path, text)), DATA)
    shared = {"mixed_precision": "no", "random_flip": False}
    assert found.autoencoder == shared and found.flags["a"] == shared | {"kl_weight": 1e-4, "latent_channels": 2}
    found = read_candidates(SearchConfig(candidates=written(tmp_path, text), mixed_precision="bf16"), DATA)
    assert found.flags["a"]["mixed_precision"] == "no" and found.transformer == found.judge == {
        "mixed_precision": "bf16"
    }


def test_candidates_augment_as_they_like(tmp_path):
    content = CANDIDATES | {"autoencoder": CANDIDATES["autoencoder"] | {"random_flip": False}}
    path = written(tmp_path, content | {"candidates": {"a": {"auxiliary_decoder": "none", "random_resized_crop": 0.5}}})
    found = read_candidates(SearchConfig(candidates=path, on_misfit="stop"), DATA | {"random_flip": True})
    assert not found.flags["a"]["random_flip"] and found.flags["a"]["random_resized_crop"] == 0.5


ORDERED = {
    "ordered-2": {"auxiliary_decoder": "prefix", "keep_latent_channels": 2, "transformer": {"timestep_shift": 2.0}},
    "ordered-3": {"auxiliary_decoder": "prefix"},
}


def test_candidates_with_fewer_channels_of_one_encoder(tmp_path):
    found = read_candidates(SearchConfig(candidates=written(tmp_path, CANDIDATES | {"candidates": ORDERED})), DATA)
    assert list(found.flags) == ["joint", "ordered-2", "ordered-3"] and "transformer" not in found.flags["ordered-2"]
    assert found.transformer_of("ordered-2") == found.transformer | {"timestep_shift": 2.0}
    assert found.transformer_of("ordered-3") == found.transformer
    wrong = {
        "four": {"auxiliary_decoder": "prefix", "keep_latent_channels": 4},
        "same": {"auxiliary_decoder": "same", "keep_latent_channels": 2},
        "patch": {"auxiliary_decoder": "none", "transformer": {"patch_size": 3}},
        "repa": {"auxiliary_decoder": "none", "transformer": {"repa_model": "x"}},
        "joint": {"auxiliary_decoder": "none"},
    }
    left_out = read_candidates(
        SearchConfig(candidates=written(tmp_path, CANDIDATES | {"candidates": wrong})), DATA
    ).left_out
    assert left_out.pop("repa").startswith("`repa_model` needs the images")
    assert left_out == {
        "four": "`keep_latent_channels` is 4, but there are 3 channels.",
        "same": "`keep_latent_channels` needs `auxiliary_decoder prefix`.",
        "patch": "latents of 8x8 cannot be cut into patches of 3.",
    }


def test_joint_training_is_always_a_candidate_and_a_published_one_may_be(tmp_path):
    content = CANDIDATES | {"candidates": {"same": {"auxiliary_decoder": "same"}}}
    found = read_candidates(SearchConfig(candidates=written(tmp_path, content), published_vae="some/vae"), DATA)
    assert list(found.flags) == ["joint", "same", "published"] and found.flags["published"] == {"vae": "some/vae"}
    assert found.flags["joint"]["auxiliary_decoder"] == "none" and found.flags["joint"]["latent_channels"] == 3
    content = CANDIDATES | {"candidates": {"published": {"auxiliary_decoder": "none"}}}
    with pytest.raises(ConfigError, match="`published` is the name of that of `published_vae`"):
        read_candidates(SearchConfig(candidates=written(tmp_path, content), published_vae="some/vae"), DATA)
    # Also where nothing else fits.
    content = CANDIDATES | {"candidates": {"coarse": CANDIDATES["candidates"]["coarse"]}}
    found = read_candidates(SearchConfig(candidates=written(tmp_path, content), published_vae="some/vae"), DATA)
    assert list(found.flags) == ["published"]


@pytest.mark.parametrize(("name", "resolution", "count"), [("default", 64, 12), ("digits", 16, 5)])
def test_packaged_candidates_fit(name, resolution, count):
    found = read_candidates(SearchConfig(candidates=name, on_misfit="stop"), DATA | {"resolution": resolution})
    assert len(found.flags) == count


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must hold `flag: value` lines, but holds a list"),
        ("a: b: c", "cannot be read"),
        ({"autoencoder": {}}, "must hold `candidates`"),
        ({"candidates": {"a": {"latent_chanels": 4}}}, "a of .* has `latent_chanels`, which is no flag"),
        ({"candidates": {"a": {"stage1_steps": 4}}}, "has `stage1_steps`, which is no flag that a candidate can set"),
        (
            {"candidates": {"a": {"validation_fraction": 0.2}}},
            "has `validation_fraction`, but all candidates have the same",
        ),
        ({"candidates": {"a": {}}, "judge": {"label_column": "x"}}, "judge of .* has `label_column`, but all"),
        ({"candidates": {"a": {}}, "transformer": {"random_flip": True}}, "has `random_flip`, but all candidates have"),
        (
            {"candidates": {"a": {}}, "transformer": {"vae": "x"}},
            "has `vae`, which is no flag that a candidate can set",
        ),
        ({"candidates": {"a": 4}}, "must be a mapping of flags, but is '4'"),
        ({"candidates": {"a": {"kl_weight": "x"}}}, "a of .*: argument --kl_weight: invalid float value: 'x'"),
        ({"candidates": {"a": {}}, "transformer": {"modle": 1}}, "transformer of .* has `modle`"),
        ({"candidates": {"a": {"transformer": {"modle": 1}}}}, "transformer of a of .* has `modle`"),
        (
            {"candidates": {"a": {"transformer": {"model": "DiT-B/2"}}}},
            "a of .* has `model`, but all pilots have one size",
        ),
        (
            {"candidates": {"joint": {"auxiliary_decoder": "same"}}},
            "`joint` is the name of joint training, which is always",
        ),
        ({"candidates": {"a/b": {}}}, "'a/b' is no name"),
        ({"candidates": {"a": {}}, "more": {}}, "it holds .'candidates', 'more'"),
    ],
)
def test_files_that_are_no_candidates_are_refused(content, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_candidates(SearchConfig(candidates=written(tmp_path, content)), DATA)


def test_unknown_names_of_candidates_are_answered_with_those_that_exist():
    with pytest.raises(ConfigError, match="`candidates` digit is neither a YAML file nor one of default, digits"):
        read_candidates(SearchConfig(candidates="digit"), DATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "soon"}, "`budget`"),
        ({"image_channels": 5}, "`image_channels` is 5, but a judge with a network takes"),
        ({"features": "x", "image_channels": 5}, "5"),
        ({"streaming": True}, "`streaming`"),
        ({"random_crop": True}, "`random_crop`"),
        (
            {"continuous_columns": ["angle"]},
            "`continuous_columns` cannot be used with find_latents.py, whose pilots know",
        ),
        ({"caption_column": "text"}, "`caption_column` cannot be used with find_latents.py, whose pilots know classes"),
        ({"keep_one_in": 1}, "`keep_one_in` is 1"),
        ({"dataset_name": None}, "`dataset_name`"),
    ],
)
def test_flags_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        compose(FindLatentsConfig, **{"dataset_name": "digits", **change})


# The search


def find(folder, candidates: str, **flags) -> list[tuple[str, str]]:
    """Runs the script with a plan that is short; returns what it launched."""
    folder.mkdir(exist_ok=True)
    if not (folder / "plan.json").exists():
        (folder / "plan.json").write_text(json.dumps(PLAN))
    flags = {**DATA, "budget": "1h", "candidates": candidates, "num_images": 12, "num_inference_steps": 1, **flags}
    words = " ".join(f"--{name} {value}" for name, value in flags.items()) + " --keep_one_in 2 --train_generator"
    with launched_here() as calls:
        run(find_latents, words, output_dir=folder)
    return calls


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search without classes and its file of candidates."""
    folder = tmp_path_factory.mktemp("search")
    candidates = written(folder, CANDIDATES)
    save_autoencoder(folder / "rgb")
    find(folder / "find", candidates, label_column="none", published_vae=folder / "rgb")
    return folder / "find", candidates


def test_search_ends_with_a_pipeline_and_a_report(searched):
    folder, _ = searched
    assert (folder / "vae" / "config.json").exists() and (folder / "pipeline" / "model_index.json").exists()
    winner = read_json(folder / "winner.json")["name"]
    text = (folder / "report.md").read_text()
    assert f"**{winner}** is the best of 4 latent spaces" in text and "| broken | 1 | failed: `" in text
    assert "| published | 1 | failed: the autoencoder takes 3 image channels, but `image_channels` is 1." in text
    assert "`coarse` was left out: latents of 1x1" in text and "by how much an image is turned" in text
    assert "dae-diffusers train-dae --dataset_name digits" in text and "dae-diffusers train-dit" in text
    assert not list(folder.rglob("latents"))
    page = (folder / "report.html").read_text()
    assert "| candidate | rungs | end | PSNR ↑ | rFD ↓ | gFD ↓ | gap ↓ | guidance | time |" in text
    rung = read_json(folder / "trials" / winner / "rung-1" / "result.json")
    assert f"| {winner} | 2 | the winner | {distances(rung)['PSNR']:.5g} |" in text  # in the rung of the others
    last = read_json(folder / "trials" / winner / "rung-2" / "result.json")
    assert f"Its last measurement: PSNR {distances(last)['PSNR']:.4g}," in text
    assert "### Reconstruction (rFD) and generation (gap)" in text and "frontier.png" not in page
    assert "http" not in page and page.count("data:image/png;base64,") == 2 + 2 * 2  # two plots, two candidates
    assert page.count("<table>") == page.count("</table>") == 1 and page.count("<pre>") == page.count("</pre>") == 1


def test_report_says_if_the_winner_is_not_told_from_joint_training():
    def rows(*distances):
        return [{"rung": {"candidates": 3}, "generation": {"gfd_judge": each}} for each in distances]

    results = {
        "joint": rows(10.0, 8.0),
        "near": rows(7.0, 5.0, 1.0),
        "far": rows(7.0, 3.0),
        "bad": [{**rows(1.0)[0], "failed": "x"}],
    }
    (text,) = not_told_apart(results, "near", "joint")
    assert "`near` and `joint` are not told apart**: gFD 5 and 8 in rung 2." in text
    assert not_told_apart(results, "far", "joint") == not_told_apart(results, "joint", "joint") == []
    assert not_told_apart(results, None, "joint") == not_told_apart(results, "near", None) == []


def test_rungs_go_on_from_their_autoencoders(searched):
    folder, _ = searched
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["broken", "joint", "published", "same"]
    assert not (folder / "trials" / "broken" / "rung-1").exists()
    log = (folder / "trials" / "joint" / "autoencoder" / "train_dae" / "log.jsonl").read_text()
    assert max(json.loads(line)["step"] for line in log.splitlines()) == 4
    stage1 = (folder / "trials" / "same" / "stage1" / "train_dae" / "log.jsonl").read_text()
    assert max(json.loads(line)["step"] for line in stage1.splitlines()) == 2  # 0.6 of 4


def test_finished_search_repeats_nothing_and_an_interrupted_one_ends_alike(searched, tmp_path, monkeypatch):
    folder, candidates = searched
    before, same = (folder / "report.md").read_text(), {"label_column": "none", "published_vae": folder.parent / "rgb"}
    assert find(folder, candidates, **same) == []
    assert (folder / "report.md").read_text() == before
    # Stopped before each of its trials in turn, in another folder.
    measure, left = find_latents.Search.run_rung, []

    def stop(self, number, rung, names):
        measure(self, number, rung, names)
        if number not in left:
            left.append(number)
            raise KeyboardInterrupt

    monkeypatch.setattr(find_latents.Search, "run_rung", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            find(tmp_path / "find", candidates, **same)
    find(tmp_path / "find", candidates, **same)
    for path in folder.glob("trials/*/rung-*/result.json"):
        first, second = read_json(path), read_json(tmp_path / "find" / path.relative_to(folder))
        assert first.get("failed", "")[:60] == second.get("failed", "")[:60], path  # then its folder
        for name in ("reconstruction", "generation"):
            assert first.get(name) == second.get(name), path


def test_folder_of_another_search_is_refused(searched, tmp_path):
    folder, candidates = searched
    with pytest.raises(UserError, match="holds another search; data:"):
        find(folder, candidates)
    with pytest.raises(UserError, match="holds another search; settings:"):
        find(folder, candidates, label_column="none", published_vae=folder.parent / "rgb", seed=1)


def test_budget_may_change_until_it_is_divided(tmp_path, monkeypatch):
    path = written(tmp_path, CANDIDATES)
    config = SearchConfig(output_dir=str(tmp_path / "find"), budget="1s", candidates=path, num_images=12)
    monkeypatch.setattr(Search, "measure_speeds", lambda self: Speeds(0.01, 0.01, 1.0))
    with pytest.raises(UserError, match="`budget` 1s cannot hold 3 candidates"):
        Search(config, DATA, read_candidates(config, DATA)).plan()
    config.budget = "1h"
    assert Search(config, DATA, read_candidates(config, DATA)).plan()
    config.budget = "2h"
    with pytest.raises(UserError, match="holds another search; `--budget`: 1h before, 2h now"):
        Search(config, DATA, read_candidates(config, DATA)).plan()
    config.num_images = 24
    with pytest.raises(UserError, match="settings: {'num_images': 12} before, {'num_images': 24} now"):
        Search(config, DATA, read_candidates(config, DATA))


def test_results_of_another_run_are_not_replaced(tmp_path):
    (tmp_path / "find" / "vae").mkdir(parents=True)
    config = SearchConfig(output_dir=str(tmp_path / "find"), candidates=written(tmp_path, CANDIDATES))
    with pytest.raises(UserError, match="holds `vae` of another run, which the result of the search would replace"):
        Search(config, DATA, read_candidates(config, DATA))


@pytest.mark.parametrize(("counts", "num_images"), [((48, 24), 9), ((9, 24), 48), ((48, 1), 48)])
def test_too_few_images_are_named_before_anything_is_trained(counts, num_images, tmp_path):
    judge = load_feature_extractor(save_backbone(tmp_path / "judge", "classifier"))
    seen = f"{counts[0]} training, {counts[1]} validation and `num_images` {num_images}"
    with pytest.raises(UserError, match=f"too few images to compare: {seen}, but at least 10, 2 and 10 are needed"):
        check_enough_images(judge, *map(range, counts), num_images)
    check_enough_images(judge, range(48), range(24), 48)


def test_guidance_is_measured_where_pilots_have_it(tmp_path, caplog):
    candidates = {
        "joint": {"auxiliary_decoder": "none"},
        "unguided": {"auxiliary_decoder": "none", "transformer": {"class_dropout_prob": 0.0}},
        "auto": {"auxiliary_decoder": "none", "transformer": {"autoguidance_steps": 1}},
    }
    path = written(tmp_path, CANDIDATES | {"candidates": candidates})
    config = SearchConfig(output_dir=str(tmp_path / "find"), candidates=path, guidance_scales=[1.0, 3.0])
    search = Search(config, DATA, read_candidates(config, DATA))
    scales = {name: search.trial(name).experiment["guidance_scales"] for name in candidates}
    assert scales == {"joint": [1.0, 3.0], "unguided": [1.0], "auto": [1.0, 3.0]}
    config.output_dir, data = str(tmp_path / "without"), {**DATA, "label_column": "none"}
    search = Search(config, data, read_candidates(config, data))
    assert [search.is_guided(name) for name in candidates] == [False, False, True]
    del search.candidates.flags["auto"]
    search.find_judge = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        search.run()
    assert "`--guidance_scales` has no effect: the images have no classes" in caplog.text


@pytest.mark.parametrize("workers", [1, 4])
def test_rungs_take_the_time_that_the_plan_gives_them(workers, tmp_path):
    """Also a rung that leaves processes without a trial, and the winner, which one process trains."""
    config = SearchConfig(output_dir=str(tmp_path / "find"), candidates=written(tmp_path, CANDIDATES))
    search, speeds = Search(config, DATA, read_candidates(config, DATA), workers), Speeds(0.02, 0.01, 3.0)
    rungs = plan_rungs(7200, 9, 3, speeds, workers)
    for number, rung in enumerate([*rungs, Rung(1, 5000, 5000)]):
        seconds = speeds.fixed + rung.autoencoder_steps * speeds.autoencoder + rung.generator_steps * speeds.generator
        for name in range(rung.candidates):
            folder = search.folder / "trials" / str(name) / f"rung-{number}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"seconds": seconds}))
    assert 3400 < search.seconds_used() - seconds <= 3600


def test_time_of_a_trial_that_was_killed_counts(tmp_path, monkeypatch):
    trial = CandidateTrial("joint", {}, {}, tmp_path, 0)
    folder = trial.folder_of(0)

    def killed(*_) -> dict:
        raise KeyboardInterrupt

    for measure, lost in ((killed, 0), (killed, 100), (lambda *_: {}, 200)):
        monkeypatch.setattr(trial, "_measure", measure)
        if lost:  # as if each had worked for 100 seconds
            noted = read_json(folder / "begun.json")
            write_json(folder / "begun.json", {**noted, "began": noted["began"] - 100})
            os.utime(folder / "begun.json", (noted["began"], noted["began"]))
        with suppress(KeyboardInterrupt):
            trial.run(0, Rung(1, 1, 1))
    assert 200 <= read_json(trial.result_path(0))["seconds"] < 230 and not (folder / "begun.json").exists()


def test_settings_may_change_until_the_budget_is_divided(tmp_path):
    """Those of the first command may be what stopped it: its judge is of other images then."""
    config = SearchConfig(output_dir=str(tmp_path / "find"), candidates=written(tmp_path, CANDIDATES), num_images=12)
    first = Search(config, DATA, read_candidates(config, DATA))
    (first.folder / "features").mkdir()
    Search(config, DATA, read_candidates(config, DATA))  # the same goes on with its judge
    assert (first.folder / "features").exists()
    data = DATA | {"on_bad_image": "skip"}
    (first.folder / "claims" / "judge").mkdir()

    def train_judge() -> None:
        lock = FolderLock(first.folder / "claims" / "judge")
        time.sleep(60)
        lock.release()

    process = in_child(train_judge, wait=False)
    while not (first.folder / "claims" / "judge" / ".owner").exists():
        time.sleep(0.05)
    with pytest.raises(UserError, match="another search is at work"):
        Search(config, data, read_candidates(config, data))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    Search(config, data, read_candidates(config, data))
    assert not (first.folder / "features").exists()
    assert read_json(first.folder / "search.json")["data"] == data
    write_json(first.folder / "plan.json", PLAN)
    with pytest.raises(UserError, match="another search; data: {'on_bad_image': 'skip'} before"):
        Search(config, DATA, read_candidates(config, DATA))


def test_judge_that_was_trained_again_is_another_search(tmp_path):
    judge = save_backbone(tmp_path / "judge", "classifier")
    config = SearchConfig(output_dir=str(tmp_path / "find"), candidates=written(tmp_path, CANDIDATES), features=judge)
    candidates = read_candidates(config, DATA)
    write_json(Search(config, DATA, candidates).folder / "plan.json", {})
    Search(config, DATA, candidates)  # the same goes on
    weights = next((tmp_path / "judge").glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds another search; judge:"):
        Search(config, DATA, candidates)


def test_images_and_published_autoencoders_that_changed_are_another_search(image_folder, tmp_path):
    data = {"train_data_dir": str(shutil.copytree(image_folder, tmp_path / "images")), "resolution": 16}
    vae, features = str(save_autoencoder(tmp_path / "vae")), save_backbone(tmp_path / "judge", "classifier")
    config = SearchConfig(
        output_dir=str(tmp_path / "find"),
        candidates=written(tmp_path, CANDIDATES),
        features=features,
        published_vae=vae,
    )
    candidates = read_candidates(config, data)
    path = Search(config, data, candidates).folder / "search.json"
    write_json(path.with_name("plan.json"), {})
    Search(config, data, candidates)  # the same goes on
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    kept = weights.read_bytes()
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds another search; published_vae:"):
        Search(config, data, candidates)
    weights.write_bytes(kept)
    next((tmp_path / "images" / "cat").iterdir()).unlink()
    with pytest.raises(UserError, match="holds another search; images:"):
        Search(config, data, candidates)
    path.write_text(json.dumps({name: value for name, value in read_json(path).items() if name != "images"}))
    Search(config, data, candidates)  # a folder of before, which does not know them


def test_a_search_in_which_all_fails_says_why_and_tries_again(tmp_path, caplog):
    caplog.set_level("INFO")
    content = CANDIDATES | {"candidates": {"broken": CANDIDATES["candidates"]["broken"]}}
    features = save_backbone(tmp_path / "judge", "classifier")
    (tmp_path / "find").mkdir()
    plan = PLAN | {"rungs": [Rung(2, 2, 2).to_dict()]}
    (tmp_path / "find" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="every candidate failed, such as `broken`: `reconstruction_loss` became"):
        find(tmp_path / "find", written(tmp_path, content), features=features)
    # The same command tries again what failed in the last rung that was begun, once.
    result = tmp_path / "find" / "trials" / "broken" / "rung-0" / "result.json"
    failed = [result.parents[2] / name / "rung-0" / "result.json" for name in ("full", "done")]
    for path, row in zip(failed, ({"failed": "out of memory"}, {}), strict=True):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(row | {"seconds": 1.0}))
    before = read_json(result)
    result.write_text(json.dumps(before | {"seconds": 1000.0}))
    with pytest.raises(UserError, match="every candidate failed"):
        find(tmp_path / "find", written(tmp_path, content), features=features)
    assert 1000 < read_json(result)["seconds"] < 1100  # the first try took time, too
    assert read_json(result) != before and [path.exists() for path in failed] == [False, True]
    assert "trying full again, which failed: out of memory" in caplog.text
    before = read_json(result)
    (result.parents[1] / "rung-1").mkdir()
    with pytest.raises(UserError, match="every candidate failed"):
        find(tmp_path / "find", written(tmp_path, content), features=features)
    assert read_json(result) == before  # the next rung was chosen without it


def test_images_of_one_class_are_judged_as_those_without_classes(image_folder, tmp_path):
    images = shutil.copytree(image_folder / "cat", tmp_path / "images")
    rows = [f"{path.name},cat\n" for path in images.iterdir()]
    (images / "metadata.csv").write_text("".join(["file_name,animal\n", *rows]))
    data = {"train_data_dir": str(images), "label_column": "animal", "resolution": 16, "validation_fraction": 0.5}
    assert load_images(DataConfig(**data))[0].id2label == {0: "cat"}
    content = CANDIDATES | {"judge": {**CANDIDATES["judge"], "train_batch_size": 8}}
    config = SearchConfig(output_dir=str(tmp_path / "find"), candidates=written(tmp_path, content))
    with launched_here():
        judge = Search(config, data, read_candidates(config, data)).find_judge()
        assert list(read_json(Path(judge) / "config.json")["id2label"].values()) == TURNS
        with pytest.raises(UserError, match="the data have training images of one class only, but a classifier needs"):
            train_classifier.main(compose(TrainClassifierConfig, **data, output_dir=str(tmp_path / "judge")))


def test_speed_is_measured_on_what_fits(tmp_path, monkeypatch):
    content = CANDIDATES | {"candidates": {"same": CANDIDATES["candidates"]["same"]}}
    config = SearchConfig(
        output_dir=str(tmp_path / "find"), candidates=written(tmp_path, content), features=save_backbone(tmp_path / "judge", "classifier"),
    )  # fmt: skip
    candidates = read_candidates(config, DATA)
    del candidates.flags["joint"]  # as if it did not fit the images
    search = Search(config, DATA, candidates)
    search.experiment["features"] = config.features
    monkeypatch.setattr("dae_diffusers.search.search._CALIBRATION", (1, 2, 4))
    with launched_here() as calls:
        search.measure_speeds()
    assert "/calibration/trials/same/stage1" in calls[0][1]


def test_speed_is_measured_before_a_plan(tmp_path):
    features = save_backbone(tmp_path / "judge", "classifier")
    config = SearchConfig(
        output_dir=str(tmp_path / "find"), budget="1s", candidates=written(tmp_path, CANDIDATES), features=features,
        num_images=12, num_inference_steps=1,
    )  # fmt: skip
    search = Search(config, DATA, read_candidates(config, DATA))
    with (
        launched_here(),
        pytest.raises(UserError, match="`budget` 1s cannot hold 3 candidates: here they need at least"),
    ):
        search.run()
    assert not (tmp_path / "find" / "plan.json").exists() and not (tmp_path / "find" / "calibration").exists()


def test_the_best_guidance_counts():
    found = [{"gfd_a": value, "gap_a": 1.0} for value in (math.nan, 3.0, 2.0, None)]
    assert closest(found) is found[2] and closest(found[:1]) is found[0]


@pytest.mark.filterwarnings("ignore:.*is larger than the data set")  # batches of the pilots
def test_payoff_compares_the_choice_with_all_in_full(tmp_path, monkeypatch, capsys):
    benchmark = load_benchmark("search_payoff")
    content = CANDIDATES | {"candidates": {"joint": CANDIDATES["candidates"]["joint"], **ORDERED}}
    command = ["search_payoff", "--candidates", written(tmp_path, content), "--output_dir", f"{tmp_path}/payoff"]
    command += ["--data", *(f"{name}={value}" for name, value in DATA.items()), "--shares", "0.5", "--seeds", "0"]
    command += [
        "--autoencoder_steps",
        "4",
        "--generator_steps",
        "4",
        "--num_images",
        "12",
        "--num_inference_steps",
        "1",
        "--guidance_scales",
        "1",
        "1.5",
    ]
    command += ["--mixed_precision", "bf16", "--features", save_backbone(tmp_path / "judge", "classifier")]
    monkeypatch.setattr(sys, "argv", command)
    draw, drawn = drawings.draw_samples, []

    def counted(pipeline, settings, folder, accelerator, **options):
        drawn.append((settings.guidance_scale, accelerator.mixed_precision))
        return draw(pipeline, settings, folder, accelerator, **options)

    monkeypatch.setattr(drawings, "draw_samples", counted)
    with launched_here(cpu_seconds=1000.0) as calls:
        benchmark.main(benchmark.parse_arguments())
        text, count = (tmp_path / "payoff" / "payoff.md").read_text(), len(calls)
        assert "| gFD / best ↓ | joint / best | mean / best | rank correlation of rung 1 | cost | wall time |" in text
        assert "The rule is" in text and "two seeds" not in text
        finals = [{"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "c": 2.0, "b": 3.0}, {"a": 5.0, "b": 6.0, "c": 7.0}]
        assert benchmark.between_seeds(finals) == [
            "Rank correlation of the full trainings of two seeds: +0.67 (+0.50, +1.00, +0.50)."
        ]
        with pytest.raises(UserError, match="holds results of other settings: `generator_steps` was 4 and is 400"):
            benchmark.main(benchmark.parse_arguments([*command[1:], "--generator_steps", "400"]))
        benchmark.main(benchmark.parse_arguments())
        assert len(calls) == count and (tmp_path / "payoff" / "payoff.md").read_text() == text
        assert drawn == [(1.0, "bf16"), (1.5, "bf16")] * 6
        # In the rung and in full, the two candidates share their stage 1. All are drawn with and without guidance.
        assert sum(name == "train_dae" and path.endswith("stage1") for name, path in calls) == 2
        folder = tmp_path / "payoff" / "seed-0"
        for path in folder.rglob("trials/*/rung-0/result.json"):
            row = read_json(path)
            gfd = {scale: distances({"generation": found})["gFD"] for scale, found in row["guidance"].items()}
            assert list(gfd) == ["1", "1.5"] and distances(row)["gFD"] == min(gfd.values())
            has_stage1 = (path.parents[1] / "stage1").exists()
            assert row["processor_seconds"] // 1000 == 3 + has_stage1  # autoencoder, latents, generator
            assert "mixed_precision: bf16" in (path.parent / "generator" / "train_dit" / "config.yaml").read_text()
            pipeline = path.parent / "generator" / "pipeline"
            shift = 2.0 if path.parents[1].name == "ordered-2" else 1.0
            assert read_json(pipeline / "scheduler" / "scheduler_config.json")["flow_shift"] == shift
            channels = 2 if path.parents[1].name == "ordered-2" else 3
            assert read_json(pipeline / "vae" / "config.json")["latent_channels"] == channels
        config = SearchConfig(output_dir=str(folder), candidates=command[2], num_images=12, num_inference_steps=1)
        config.guidance_scales, config.mixed_precision = [1.0, 1.5], "bf16"
        config.features, data = (
            command[-1],
            benchmark.choose_data(command[command.index("--data") + 1 : command.index("--shares")]),
        )
        search = Search(config, data, read_candidates(config, data))
        first, second, generator, evaluation = full_commands(search, "ordered-2")
        assert first.endswith("--auxiliary_decoder prefix --stage 1 --output_dir runs/ordered")
        again = "--stage 2 --stage1_dir runs/ordered --keep_latent_channels 2 --output_dir runs/best"
        assert "prefix" not in second and second.endswith(again)
        assert "--vae runs/best/vae" in generator and "--timestep_shift 2.0" in generator
        # What short pilots wanted is not what it will want.
        assert "guidance" not in generator and "--guidance_scales 1 1.5 2 3 --set_defaults" in evaluation
        AcceleratorState._reset_state(reset_partial_state=True)  # another process, in another precision
        forecast = load_benchmark("forecast")
        command = ["forecast", "--runs", f"{tmp_path}/payoff", "--output_dir", f"{tmp_path}/forecast"]
        monkeypatch.setattr(sys, "argv", [*command, "--widths", "8", "--steps", "1", "--num_images", "12"])
        forecast.main(forecast.parse_arguments())
        assert "### payoff seed-0: 3 runs" in (tmp_path / "forecast" / "forecast.md").read_text()


# The forecast of benchmarks/forecast.py


def test_forecast_of_a_power_law_is_exact():
    forecast = load_benchmark("forecast").forecast
    points = {name: [(x, height * x**-0.4) for x in (10, 30, 90)] for name, height in (("a", 5.0), ("b", 7.0))}
    for name, found in forecast(points, 1000).items():
        exact = {"a": 5.0, "b": 7.0}[name] * 1000**-0.4
        assert found.value == pytest.approx(exact) and found.low == pytest.approx(found.high)


def test_intervals_hold_nine_of_ten():
    forecast = load_benchmark("forecast").forecast
    draw, held, total = random.Random(0), 0, 0
    for _ in range(400):
        heights = {name: draw.gauss(2, 1) for name in "abcd"}
        points = {
            name: [(x, math.exp(height - 0.3 * math.log(x) + draw.gauss(0, 0.1))) for x in (10, 30, 90)]
            for name, height in heights.items()
        }
        for name, found in forecast(points, 900).items():
            true = math.exp(heights[name] - 0.3 * math.log(900) + draw.gauss(0, 0.1))
            held, total = held + (found.low <= true <= found.high), total + 1
    assert 0.87 < held / total < 0.93


def test_too_few_points_have_no_interval():
    forecast = load_benchmark("forecast").forecast
    found = forecast({"a": [(10, 5.0)], "b": [(10, 7.0)], "c": []}, 1000)
    assert {name: each.value for name, each in found.items()} == pytest.approx({"a": 5.0, "b": 7.0})
    assert math.isinf(found["a"].high) and str(found["a"]) == "5"
