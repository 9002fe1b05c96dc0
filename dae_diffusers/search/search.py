"""The search: rung after rung, from all candidates to one, and the winner's training."""

import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.comparison.judges import find_features
from dae_diffusers.comparison.sharing import do_once, is_at_work, share
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import UserError
from dae_diffusers.metrics.checks import check_enough_images
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.search.candidates import Candidates, stage1_flags
from dae_diffusers.search.planning import Rung, Speeds, plan_rungs, plan_winner, turns_of
from dae_diffusers.search.settings import SearchConfig, show_seconds
from dae_diffusers.search.trial import FORGOTTEN, CandidateTrial, distances
from dae_diffusers.search.turned import write_turned
from dae_diffusers.settings import changes_of
from dae_diffusers.store import read_json, read_json_or, replace_folder, write_json
from dae_diffusers.weights import model_fingerprint

logger = logging.getLogger(__name__)

_FIXED = ("keep_one_in", "num_images", "guidance_scales", "num_inference_steps", "train_generator", "seed")
# What other scripts leave in their output folder.
_RESULTS_OF_OTHERS = ("vae", "pipeline", "stage1", "train_dae", "train_dit")
_CALIBRATION = (2, 12, 42)  # steps at which the clock is read; the first reading warms up


class Search:
    r"""
    A search in a folder, begun or continued. Several processes may work in the same folder.

    Args:
        config ([`SearchConfig`]): The search.
        data (`dict`): Flags of the images.
        candidates ([`Candidates`]): What is tried.
        workers (`int`, *optional*): Processes that were started together.

    Raises:
        UserError: If the folder holds another search.
    """

    def __init__(self, config: SearchConfig, data: dict[str, Any], candidates: Candidates, workers: int = 1):
        self.config, self.data, self.candidates, self.workers = config, data, candidates, workers
        self.folder, self.began = Path(config.output_dir), time.monotonic()
        self.planned: dict[str, Any] = {"seconds": 0.0}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images = load_images(DataConfig(**data))
        described = {
            "data": data,
            "images": {"fingerprints": [split.fingerprint for split in self.images]},
            "candidates": candidates.flags,
            "transformers of candidates": candidates.own_transformer,
            "transformer": candidates.transformer,
            "judge": candidates.judge if config.features is None else _described(config.features),
            "published_vae": config.published_vae and _described_vae(config.published_vae),
            "settings": {name: getattr(config, name) for name in _FIXED},
            "mixed_precision": config.mixed_precision,
        }
        path = self.folder / "search.json"
        others = [name for name in _RESULTS_OF_OTHERS if (self.folder / name).exists()]
        if others and not path.exists():
            raise UserError(
                f"`output_dir` {self.folder} holds `{others[0]}` of another run, which the result of the search would replace. "
                "Choose another folder."
            )
        plan = self.folder / "plan.json"

        def is_begun() -> bool:
            # Until the budget is divided, nothing is lost: what was wrong with the settings may have stopped the search.
            return path.exists() and (plan.exists() or read_json(path) == json.loads(json.dumps(described)))

        def begin() -> None:
            busy = [name for name in ("judge", "plan") if path.exists() and is_at_work(name, self.folder)]
            if busy:
                raise UserError(
                    f"another search is at work in `output_dir` {self.folder}, with other settings. Wait for it, or choose another folder."
                )
            shutil.rmtree(self.folder / "features", ignore_errors=True)  # a judge of other settings
            write_json(path, described)

        do_once("begin", self.folder, is_begun, begin)
        before = read_json(path)
        for name, value in described.items():
            if before.get(name, value) != value:  # a folder of an older version says less
                self.refuse(name, *_difference(before[name], value))
        self.experiment = {
            "data": data,
            "num_images": config.num_images,
            "num_inference_steps": config.num_inference_steps,
            "mixed_precision": config.mixed_precision,
        }

    def refuse(self, name: str, before: Any, now: Any) -> None:
        raise UserError(
            f"`output_dir` {self.folder} holds another search; {name}: {before} before, {now} now. Choose another folder."
        )

    def run(self) -> None:
        r"""Searches until the winner is trained, or goes on with that."""
        if "guidance_scales" in changes_of(self.config) and not any(map(self.is_guided, self.candidates.flags)):
            logger.warning("`--guidance_scales` has no effect: the images have no classes, so pilots have no guidance.")
        self.experiment["features"] = self.find_judge()
        rungs = self.plan()
        self.forget_failures()
        self.train_winner(self.choose(rungs), rungs)

    def forget_failures(self, folder: Path | None = None) -> None:
        r"""
        Moves failed results of the newest rung aside, so that this start tries them once more: memory or the disk may have been full. Each
        process does this once, when it starts, so that processes that share the work do not go on for ever.

        Args:
            folder (`Path`, *optional*): Of the trials; default: that of the search.
        """
        folders = list((folder or self.folder).glob("trials/*/rung-*"))
        last = max((int(folder.name.partition("-")[2]) for folder in folders), default=0)
        paths = [folder / "result.json" for folder in folders if folder.name == f"rung-{last}"]
        for path in sorted(paths):
            reason = read_json_or(path, {}).get("failed")
            if reason is not None:
                logger.info("trying %s again, which failed: %s", path.parents[1].name, reason)
                with suppress(FileNotFoundError):  # another process was first
                    path.replace(path.with_name(FORGOTTEN))

    def choose(self, rungs: list[Rung]) -> str:
        r"""Goes through the rungs and returns the candidate that is left."""
        names = list(self.candidates.flags)
        for number, rung in enumerate(rungs):
            self.run_rung(number, rung, names)
            names = self.best(number, names)[: rungs[number + 1].candidates if number + 1 < len(rungs) else 1]
        return names[0]

    def find_judge(self) -> str:
        """The features that judge: those of the settings, or those of a classifier, of classes or of turns, trained on the images."""
        if self.config.features is not None:
            return self.config.features
        folder, flags = self.folder / "features" / "classifier", {**self.candidates.judge, "seed": self.config.seed}

        def train() -> None:
            data = self.data
            if not self.images[0].has_classes:  # self-supervised: it tells by how much an image is turned
                turned = self.folder / "features" / "turned"
                write_turned(self.images, turned)
                data = {name: data[name] for name in ("resolution", "image_channels") if name in data}
                data["dataset_name"] = str(turned)
            find_features(flags, data, self.folder)
            shutil.rmtree(self.folder / "features" / "turned", ignore_errors=True)

        do_once("judge", self.folder, (folder / "results.json").exists, train)
        return str(folder)

    def plan(self) -> list[Rung]:
        """The rungs, planned once from how fast training is here."""
        path = self.folder / "plan.json"

        def make() -> None:
            speeds = self.measure_speeds()
            used = time.monotonic() - self.began  # the judge's training included
            count = len(self.candidates.flags)
            rungs = plan_rungs(self.config.seconds, count, self.config.keep_one_in, speeds, self.workers, used)
            write_json(
                path,
                {
                    "budget": self.config.budget,
                    "speeds": vars(speeds),
                    "rungs": [rung.to_dict() for rung in rungs],
                    "seconds": used,
                },
            )

        do_once("plan", self.folder, path.exists, make)
        self.planned = read_json(path)
        if self.planned.get("budget", self.config.budget) != self.config.budget:
            self.refuse("`--budget`", self.planned["budget"], self.config.budget)
        self.speeds = Speeds(**self.planned["speeds"])
        return [Rung(**rung) for rung in self.planned["rungs"]]

    def measure_speeds(self) -> Speeds:
        """Times a few steps of joint training, or of the first candidate where that does not fit, and of a generator on its latents."""
        channels, flags = self.images[0].config.image_channels, self.candidates.flags
        judge = load_feature_extractor(self.experiment["features"], channels=channels)
        check_enough_images(judge, *self.images, self.config.num_images)
        name = self.candidates.joint or next(iter(flags))
        folder = self.folder / "calibration"
        shutil.rmtree(folder, ignore_errors=True)  # left by a kill
        trial = self.trial(name, folder)

        def train_autoencoder(number: int, steps: int) -> None:
            trial.train_autoencoder(number, steps)

        def train_pilot(number: int, steps: int) -> None:
            row = trial.run(len(_CALIBRATION) + number, Rung(1, _CALIBRATION[-1], steps))
            if "failed" in row:
                raise UserError(f"candidate `{name}` failed while its speed was measured: {row['failed']}")

        autoencoder = _per_step(_clock(train_autoencoder))
        clock = _clock(train_pilot)
        generator = _per_step(clock, whole=True)
        shutil.rmtree(folder)
        return Speeds(autoencoder, generator, fixed=max(0.0, clock[-1] - _CALIBRATION[-1] * generator))

    def run_rung(self, number: int, rung: Rung, names: list[str]) -> None:
        """Trains and measures all candidates of a rung, together with other processes."""
        trials = {name: self.trial(name) for name in names}

        def work(name: str) -> None:
            row = trials[name].run(number, rung)
            said = f"failed: {row['failed']}" if "failed" in row else _show(row)
            done = sum(each.result_path(number).exists() for each in trials.values())
            left = max(0.0, self.config.seconds - self.seconds_used())
            logger.info(
                "rung %d, %s: %s (%d of %d; %s left)", number + 1, name, said, done, len(names), show_seconds(left)
            )

        share(names, self.folder / f"rung-{number}", lambda name: trials[name].result_path(number).exists(), work)

    def trial(self, name: str, folder: Path | None = None) -> CandidateTrial:
        r"""A candidate, in the folder of the search or in another."""
        scales = self.config.guidance_scales if self.is_guided(name) else [1.0]
        experiment = {**self.experiment, "transformer": self.candidates.transformer_of(name), "guidance_scales": scales}
        flags = self.candidates.flags
        same = (each for each in flags if stage1_flags(flags[each]) == stage1_flags(flags[name]))
        return CandidateTrial(name, flags[name], experiment, folder or self.folder, self.config.seed, next(same))

    def is_guided(self, name: str) -> bool:
        """Whether guidance changes what a candidate's pilots draw."""
        flags = self.candidates.transformer_of(name)
        learns_none = not self.images[0].has_classes or flags.get("class_dropout_prob") == 0
        return not learns_none or flags.get("autoguidance_steps") is not None

    def result(self, name: str, number: int) -> dict[str, Any]:
        return read_json(self.trial(name).result_path(number))

    def best(self, number: int, names: list[str]) -> list[str]:
        r"""
        The candidates of a rung that did not fail, the best first.

        Raises:
            UserError: If all failed.
        """
        rows = {name: self.result(name, number) for name in names}
        whole = [name for name in names if "failed" not in rows[name]]
        if not whole:
            raise UserError(f"every candidate failed, such as `{names[0]}`: {rows[names[0]]['failed']}")
        return sorted(whole, key=lambda name: distances(rows[name])["gFD"])

    def seconds_used(self) -> float:
        """Wall time so far: that of each rung, whose trials the processes share. The winner is the only trial of the last."""
        rungs: dict[str, list[float]] = {}
        for path in self.folder.glob("trials/*/rung-*/result.json"):
            rungs.setdefault(path.parent.name, []).append(read_json_or(path, {"seconds": 0.0})["seconds"])
        used = (turns_of(len(each), self.workers) * statistics.mean(each) for each in rungs.values())
        return self.planned["seconds"] + math.fsum(used)

    def train_winner(self, name: str, rungs: list[Rung]) -> None:
        """The rest of the budget for the winner, whose result becomes `vae/`, and `pipeline/` if that is wanted."""
        path, number, with_generator = self.folder / "winner.json", len(rungs), self.config.train_generator

        def decide() -> None:
            left = self.config.seconds - self.seconds_used()
            rung = plan_winner(left, self.speeds, rungs[-1] if rungs else None, with_generator)
            write_json(path, {"name": name, "rung": rung.to_dict()})

        do_once("decide", self.folder, path.exists, decide)
        rung, trial = Rung(**read_json(path)["rung"]), self.trial(name)
        logger.info("the winner is %s: %d steps of its autoencoder", name, rung.autoencoder_steps)
        finished = self.folder / "finished.json"

        def train() -> None:
            if not trial.result_path(number).exists():
                trial.run(number, rung, with_generator=with_generator)
            row = self.result(name, number)
            if "failed" in row:
                raise UserError(f"the winner `{name}` failed in its last training: {row['failed']}")
            if Path(row["vae"]).is_dir():
                replace_folder(self.folder / "vae", partial(shutil.copytree, row["vae"]))
            if with_generator:
                pipeline = trial.folder_of(number) / "generator" / "pipeline"
                replace_folder(self.folder / "pipeline", partial(shutil.copytree, pipeline))
            write_json(finished, {"vae": row["vae"]})

        do_once("winner", self.folder, finished.exists, train)


def _difference(before: Any, now: Any) -> tuple[Any, Any]:
    """Of two mappings, the parts that are not the same."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return tuple({name: each[name] for name in names if name in each} for each in (before, now))


def _clock(train: Callable[[int, int], None]) -> list[float]:
    """Seconds of each training of the calibration."""
    seconds = []
    for number, steps in enumerate(_CALIBRATION):
        start = time.monotonic()
        train(number, steps)
        seconds.append(time.monotonic() - start)
    return seconds


def _per_step(clock: list[float], *, whole: bool = False) -> float:
    """Seconds of a step from the last two readings; `whole`: each counts from step 0."""
    first, middle, last = _CALIBRATION
    steps = last - middle if whole else (last - middle) - (middle - first)  # a part goes on from the one before
    least = clock[2] / last / 4  # where noise in the clock makes the difference too small
    return max((clock[2] - clock[1]) / steps, least)


def _described(features: str) -> dict[str, str]:
    """The name of a judge and a fingerprint of its weights."""
    return {"features": features, "fingerprint": load_feature_extractor(features).fingerprint}


def _described_vae(name: str) -> dict[str, str]:
    """The name of an autoencoder and a fingerprint of its weights and config."""
    return {"vae": name, "fingerprint": model_fingerprint(load_autoencoder(name))}


def _show(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in distances(row).items())
