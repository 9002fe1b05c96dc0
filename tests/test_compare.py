"""A comparison shows what differs between runs, marks the best, and says what cannot be compared."""

import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dae_diffusers.cli import parse_config
from dae_diffusers.compared_runs.pictures import figure_of_runs, side_by_side
from dae_diffusers.compared_runs.reading import read_runs, short_names
from dae_diffusers.compared_runs.tables import write_tables
from dae_diffusers.directions import direction
from dae_diffusers.errors import UserError
from dae_diffusers.training import compare
from dae_diffusers.training.settings import CompareConfig, with_flags


def write_run(folder: Path, log=(), script="train_dae", grids=(), record=None, **config) -> Path:
    """A run as a training leaves it, as far as a comparison reads it."""
    place = folder / script
    (place / "grids").mkdir(parents=True)
    settings = {"output_dir": str(folder), "resolution": 16, "vae": f"{folder}/vae", **config}
    (place / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    known = {
        "steps": {"max_train_steps": 20},
        "inputs": {"the training images": "one", "the encoder of `--vae`": "one"},
    }
    (place / "run.json").write_text(json.dumps(known | (record or {})))
    (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    for name in grids:
        Image.new("RGB", (40, 20), "red").save(place / "grids" / name)
    return folder


def write_evaluation(folder: Path, rows=(), reconstruction=None, floor=None, **setting) -> Path:
    folder.mkdir(parents=True)
    described = {
        "features": {"name": "tiny", "fingerprint": "judge"},
        "more_features": {"pixels": "further"},
        "train_images": {"number": 90, "fingerprint": "one"},
        "validation_images": {"number": 10, "fingerprint": "one"},
        "config": {"output_dir": str(folder), "pipeline": f"{folder.parent}/pipeline", "resolution": 16},
    } | setting
    metrics = {"reconstruction": reconstruction or {}, "generation": list(rows), "floor": floor, "setting": described}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def tables_of(*folders: Path) -> dict[str, dict[str, list[str]]]:
    """Each row's cells by its first one, for each table by its headings, such as `Results train_dae`."""
    text = write_tables(*read_runs(folders))
    tables, headings = {}, {}
    for line in text.splitlines():
        if heading := re.match(r"(#+) (.*)", line):
            headings = {level: each for level, each in headings.items() if level < len(heading[1])} | {
                len(heading[1]): heading[2]
            }
        elif line.startswith("| "):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            tables.setdefault(" ".join(headings.values()), {})[first] = cells
    return tables | {"text": text}


def test_only_settings_that_differ_are_listed(tmp_path):
    first = write_run(tmp_path / "a", lr=1e-3, seed=0, push_to_hub=True, sizes=[8, 8], use_ema=True)
    second = write_run(tmp_path / "b", lr=1e-4, seed=0, sizes=None, use_ema=False, new=3)
    record = {"versions": {"torch": "2.9"}, "counts": {"training_images": 7, "parameters": 3}}
    third = write_run(tmp_path / "c", lr=1e-4, seed=0, sizes=[8, 9], use_ema=True, vae="other", record=record)
    assert tables_of(first, second, third)["Settings that differ train_dae"] == {
        "setting": ["a", "b", "c"],
        "vae": ["its own vae", "its own vae", "other"],
        "lr": ["0.001", "0.0001", "0.0001"],
        "sizes": ["8 8", "not given", "8 9"],
        "use_ema": ["yes", "no", "yes"],
        "new": ["–", "3", "–"],
    }
    assert (
        "None: all settings are the same."
        in tables_of(first, write_run(tmp_path / "d", seed=0, lr=1e-3, sizes=[8, 8], use_ema=True))["text"]
    )


def test_last_and_best_values_and_the_best_run(tmp_path):
    log = [(5, 20.0, 0.5), (10, 24.0, 0.2), (20, 23.0, 0.3)]
    rows = [{"step": step, "validation/psnr": psnr, "validation/l1": l1} for step, psnr, l1 in log]
    first = write_run(tmp_path / "a", rows, record={"seconds": 40.0, "counts": {"parameters": 1234}})
    second = write_run(tmp_path / "b", [{"step": 5, "validation/psnr": 23.5, "validation/new": 1}])
    with (second / "train_dae" / "log.jsonl").open("a") as file:
        file.write('{"step": 15, "validation/psnr": NaN, "train/loss": 1}\n{"step": 20, "valid')  # killed
    third = write_run(tmp_path / "c")
    assert tables_of(first, second, third)["Results train_dae"] == {
        "": ["a", "b", "c"],
        "steps": ["20 of 20", "15 of 20", "0 of 20"],
        "training time": ["40 seconds", "–", "–"],
        "seconds a step": ["2", "–", "–"],
        "parameters": ["1,234", "–", "–"],
        "psnr ↑, last": ["23", "**23.5**", "–"],
        "psnr ↑, best": ["**24** (step 10)", "23.5 (step 5)", "–"],
        "l1 ↓, last": ["0.3", "–", "–"],
        "l1 ↓, best": ["0.2 (step 10)", "–", "–"],
        "new, last": ["–", "1", "–"],
    }


def test_steps_and_inputs_of_older_runs_come_from_their_newest_checkpoint(tmp_path):
    folders = [write_run(tmp_path / name, [{"step": 3, "validation/psnr": 20.0 + n}]) for n, name in enumerate("ab")]
    for folder, image in zip(folders, ("one", "two"), strict=True):
        (folder / "train_dae" / "run.json").write_text("{}")
        for step in (1, 2):
            state = {
                "plan": {"steps": {"stage1_steps": step, "stage2_steps": 5}},
                "inputs": {"the training images": image},
            }
            checkpoint = folder / "train_dae" / "checkpoints" / f"checkpoint-0000000{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "checkpoint.json").write_text(json.dumps({"state": state}))
    results = tables_of(*folders)["Results train_dae"]
    assert results["steps"] == ["3 of 7", "3 of 7"] and "psnr ↑, last †" in results


@pytest.mark.parametrize(
    ("metric", "changed", "config", "reason"),
    [
        ("psnr", {}, {}, None),
        ("psnr", {"inputs": {"the training images": "two"}}, {}, "the training images"),
        ("psnr", {}, {"resolution": 32}, "resolution"),
        ("psnr", {}, {"metric_images": 9}, None),
        ("gfd_x", {}, {"metric_images": 9}, "metric_images"),
        ("gfd_x", {"inputs": {"the training images": "one", "the encoder of `--vae`": "two"}}, {}, None),
        ("loss", {"inputs": {"the training images": "one", "the encoder of `--vae`": "two"}}, {}, "the encoder of"),
        ("loss", {"objective": "FlowMatching"}, {}, None),
        ("loss", {"objective": "Diffusion"}, {}, "objective"),
        ("loss", {"inputs": None}, {"train_data_dir": "elsewhere"}, "train_data_dir"),
    ],
)
def test_numbers_of_other_images_judges_or_latents_are_marked_and_none_is_the_best(
    tmp_path, metric, changed, config, reason
):
    config = {"train_data_dir": "here", "metric_images": 5} | config
    rows = [[{"step": 1, f"validation/{metric}": value}] for value in (1.0, 2.0)]
    first = write_run(
        tmp_path / "a", rows[0], train_data_dir="here", metric_images=5, record={"objective": "FlowMatching"}
    )
    second = write_run(tmp_path / "b", rows[1], record=changed, **config)
    tables = tables_of(first, second)
    mark, best = ("", int(direction(metric) == "↑")) if reason is None else (" †", None)
    cells = tables["Results train_dae"][f"{metric} {direction(metric)}, last{mark}"]
    assert [cell.startswith("**") for cell in cells] == [n == best for n in range(2)]
    assert (reason is None) == ("Not comparable" not in tables["text"])
    assert reason is None or re.search(rf"`{metric}`, because these differ: {reason}", tables["text"])


def test_evaluations_count_at_their_best_setting(tmp_path):
    row = {"num_images": 50, "guidance_interval": [0.0, 0.6], "num_inference_steps": 4, "seed": 0}
    sweep = [
        row | {"guidance_scale": g, "gfd_tiny": d, "gfd_tiny_sd": 0.5, "recall": d / 10}
        for g, d in ((1, 4.0), (2, 3.0))
    ]
    floor = {"reconstruction": {"rfd_tiny": 0.5}, "generation": {"num_images": 10, "real": {"gfd_tiny": 1.0}}}
    first = write_evaluation(tmp_path / "a" / "evaluation", sweep, {"psnr": 20.0, "rfd_tiny": 2.0}, floor)
    second = write_evaluation(tmp_path / "b" / "evaluation", sweep[:1], {"psnr": 21.0, "rfd_tiny": 3.0})
    tables = tables_of(first, second)
    assert tables["Results evaluate"] == {
        "": ["a", "b"],
        "judge": ["tiny (judge)"] * 2,
        "training images": ["90 (one)"] * 2,
        "held-out images": ["10 (one)"] * 2,
        "resolution": ["16"] * 2,
        "samples": ["50"] * 2,
        "drawn with": ["guidance 2 from 0 to 0.6, 4 steps, best of 2", "guidance 1 from 0 to 0.6, 4 steps"],
        "psnr ↑": ["20", "**21**"],
        "rfd_tiny ↓": ["**2**", "3"],
        "rfd_tiny of real images": ["0.5", "–"],
        "gfd_tiny ↓": ["**3** ± 0.5", "4 ± 0.5"],
        "gfd_tiny of real images": ["1", "–"],
        "recall ↑": ["0.3", "**0.4**"],
    }
    assert "None: all settings are the same." in tables["text"]


@pytest.mark.parametrize(
    ("setting", "number", "marked"),
    [
        ({"features": {"name": "tiny", "fingerprint": "other"}}, 50, {"rfd_tiny", "gfd_tiny", "gap"}),
        ({"validation_images": {"number": 9, "fingerprint": "two"}}, 50, {"psnr", "rfd_tiny"}),
        ({"train_images": {"number": 9, "fingerprint": "two"}}, 50, {"gfd_tiny", "gfd_pixels", "gap", "clip_score_b"}),
        ({}, 60, {"gfd_tiny", "gfd_pixels", "gap", "clip_score_b"}),
        ({"more_features": {"pixels": "other"}}, 50, {"gfd_pixels"}),
        ({"clip_model": {"name": "b", "fingerprint": "other"}}, 50, {"clip_score_b"}),
        ({"config": {"output_dir": "b", "resolution": 16, "prompt": "a dog"}}, 50, {"clip_score_b"}),
        ({"weights": {"vae": "two"}}, 50, {"gap"}),
    ],
)
def test_evaluations_with_other_judges_images_or_numbers_are_marked(tmp_path, setting, number, marked):
    row = {"num_images": 50, "gfd_tiny": 4.0, "gap": 1.0, "gfd_pixels": 3.0, "clip_score_b": 30.0}
    same = {"weights": {"vae": "one"}, "clip_model": {"name": "b", "fingerprint": "one"}}
    first = write_evaluation(tmp_path / "a", [row], {"psnr": 20.0, "rfd_tiny": 1.0}, **same)
    changed = same | setting
    other = {name: value + 1 for name, value in row.items()} | {"num_images": number}
    second = write_evaluation(tmp_path / "b", [other], {"psnr": 21.0, "rfd_tiny": 2.0}, **changed)
    results = tables_of(first, second)["Results evaluate"]
    names = ("psnr", "rfd_tiny", "gfd_tiny", "gap", "gfd_pixels", "clip_score_b")
    found = {name: next(cells for key, cells in results.items() if key.startswith(f"{name} ")) for name in names}
    assert {key.split()[0] for key in results if "†" in key} == marked
    assert {name for name, cells in found.items() if not any("**" in cell for cell in cells)} == marked


def test_an_evaluation_of_other_weights_than_those_of_the_training_is_named(tmp_path):
    for name, weights in (("a", "old"), ("b", "new")):
        folder = write_run(tmp_path / name, script="train_dit", record={"weights": {"transformer": "new"}})
        write_evaluation(folder / "evaluation", weights={"transformer": weights})
    text = tables_of(tmp_path / "a", tmp_path / "b")["text"]
    assert f"a: {tmp_path / 'a' / 'evaluation'} measured other weights (transformer)" in text and "b: " not in text


def test_runs_of_several_kinds_are_compared_in_what_they_share(tmp_path):
    rows = [{"step": 1, "validation/psnr": 20.0, "validation/loss": 1.0, "train/mine": 1.0}]
    write_run(write_run(tmp_path / "both", rows), rows, "train_dit")
    only_dit, only_prior = (
        write_run(tmp_path / "dit", rows, "train_dit"),
        write_run(tmp_path / "p", rows, "train_vqgan_prior"),
    )
    runs, _ = read_runs([tmp_path / "both", only_dit, only_prior])
    text = write_tables(runs, [])
    assert "### train_dae" not in text and "Only both has train_dae" in text and "Only p has train_vqgan_prior" in text
    assert text.count("### train_dit") == 2
    titles = {axis.get_title(): len(axis.get_lines()) for axis in figure_of_runs(runs).axes}
    assert titles == {"validation/psnr ↑": 2, "validation/loss ↓": 2, "train/mine": 2}
    with pytest.raises(UserError, match="dit has train_dit; p has train_vqgan_prior. Give two runs"):
        write_tables(runs[1:], [])
    assert figure_of_runs(runs[1:]) is None


def test_newest_grids_stand_in_a_column_for_each_run(tmp_path):
    grids = ["samples-00000001.png", "samples-00000003.png"]
    first = write_run(tmp_path / "a", script="train_dit", grids=grids)
    second, third = (
        write_run(tmp_path / name, script="train_dit", grids=grids[:n]) for name, n in (("b", 1), ("c", 0))
    )
    Image.new("RGB", (60, 20), "blue").save(first / "train_dit" / "grids" / grids[1])
    sheet = side_by_side(read_runs([third, first, second])[0])
    top = sheet.height - 12 - 20
    assert sheet.width == 60 + 12 + 40
    assert [sheet.getpixel((x, top)) for x in (0, 59, 72)] == [(0, 0, 255), (0, 0, 255), (255, 0, 0)]
    assert side_by_side(read_runs([first, third])[0]) is None  # one run alone has grids


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5, unique=True)
)
def test_short_names_tell_folders_apart(paths):
    names = short_names([Path("/", *parts) for parts in paths])
    assert len(set(names)) == len(paths) and all(names)
    for name, parts in zip(names, paths, strict=True):
        assert f"/{name}/" in f"/{'/'.join(parts)}/"
    ends = {(name.split("/")[0], name.split("/")[-1]) for name in names}
    if all("/" in name for name in names):  # no shared part is left at an end
        assert len({first for first, _ in ends}) > 1 and len({last for _, last in ends}) > 1


def test_folders_that_hold_no_run_are_named_with_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs") / "a")
    write_run(Path("runs") / "b")
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "empty" / "metrics.json").write_text('{"psnr": 1}')  # of another script
    for folders, message in (
        (["runs/none"], r"runs/none is not a folder. Give .*looked for"),
        (["runs"], r"runs holds no run.* Give the folders in it \(a, b, empty\)"),
        (["runs/a/train_dae"], r"holds no run.* Give runs/a\."),
        (["runs/a", "runs/b", "runs/a"], "runs/a is given twice"),
        (["runs/a", "runs/b/../a"], "runs/b/../a and runs/a are the same folder"),
    ):
        with pytest.raises(UserError, match=message):
            read_runs(folders)
    runs, left_out = read_runs(["runs/a", "runs/empty", "runs/b"])
    assert [run.name for run in runs] == ["a", "b"] and len(left_out) == 1
    assert "Left out: runs/empty holds no run" in write_tables(runs, left_out)
    (tmp_path / "runs" / "b" / "train_dae" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"b/train_dae/config.yaml cannot be read"):
        read_runs(["runs/a", "runs/b"])


def test_command_writes_and_prints_tables_and_pictures(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    rows = [{"step": n, "train/loss": 1.0 / n, "validation/psnr": n} for n in (1, 2, 3)]
    for name, number in (("a", 2), ("b", 3)):
        write_run(Path(name), rows[:number], grids=["reconstruction-stage1-00000001.png"])

    def run(*words: str) -> set[str]:
        compare.main(parse_config(CompareConfig, with_flags("compare", list(words))))
        return {path.name for path in Path("out").iterdir() if path.name != ".owner"}

    assert run("a", "b", "--output_dir", "out") == {"compare.md", "curves.png", "samples.png"}
    text = Path("out", "compare.md").read_text()
    row = "| steps        | 2 of 20    | 3 of 20        |"
    assert row in text and row in caplog.text
    assert "![curves](curves.png)" in text and "![samples](samples.png)" in text
    for name in "ab":
        (tmp_path / name / "train_dae" / "grids" / "reconstruction-stage1-00000001.png").unlink()
    assert run("a", "b", "--output_dir", "out") == {"compare.md", "curves.png"}  # no picture of the earlier comparison
    assert run("b", "--output_dir", "out") == {"compare.md", "curves.png"}  # one run is summed up
    assert "Settings" not in Path("out", "compare.md").read_text()
    with pytest.raises(UserError, match="`output_dir` a is one of the runs"):
        run("a", "b", "--output_dir", "a")
    Path("file").touch()
    with pytest.raises(UserError, match="`output_dir`: file cannot be written"):
        run("a", "b", "--output_dir", "file")


def test_the_decoder_of_stage_1_is_no_result(tmp_path):
    """It is thrown away: its numbers count only where there are no others, and not beside those of a final one."""
    steps = {"steps": {"stage1_steps": 10, "stage2_steps": 10}}
    log = [{"step": 10, "validation/psnr": 28.0}, {"step": 20, "validation/psnr": 26.0}]
    two = write_run(tmp_path / "two", log, record=steps)
    joint = write_run(
        tmp_path / "joint", [{"step": 20, "validation/psnr": 27.0}], record={"steps": {"stage1_steps": 20}}
    )
    early = write_run(tmp_path / "early", log[:1], record=steps)
    found = tables_of(two, joint)["Results train_dae"]
    assert found["psnr ↑, best"] == ["26 (step 20)", "**27** (step 20)"]
    found = tables_of(early, joint)
    assert found["Results train_dae"]["psnr ↑, best †"] == ["28 (step 10)", "27 (step 20)"]
    assert "Not comparable: `psnr`, because these differ: decoder" in found["text"]


def test_distances_of_two_judges_with_one_name_have_no_winner(tmp_path):
    runs = [
        write_run(tmp_path / name, [{"step": 20, "validation/rfd_x": value}], metric_features=f"{name}/x")
        for name, value in (("a", 6.0), ("b", 8.0))
    ]
    found = tables_of(*runs)
    assert found["Results train_dae"]["rfd_x ↓, last †"] == ["6", "8"] and "metric_features" in found["text"]


def test_a_file_beside_runs_is_left_out_and_named(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    (tmp_path / "notes.txt").write_text("mine")
    found, left_out = read_runs([*runs, tmp_path / "notes.txt"])
    assert [run.name for run in found] == ["a", "b"] and left_out == [f"{tmp_path / 'notes.txt'} is a file."]
