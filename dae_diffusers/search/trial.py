"""Trains and measures one candidate in one rung."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from dae_diffusers.autoencoders.loading import check_image_size, load_autoencoder
from dae_diffusers.comparison.scripts import ScriptError, launch_script, shared_flags
from dae_diffusers.comparison.sharing import do_once
from dae_diffusers.comparison.trials import Ruler, cache_latents, train_generator
from dae_diffusers.data import DataConfig
from dae_diffusers.engine.settings import warmup_of
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.metrics.defaults import write_defaults
from dae_diffusers.metrics.report import draw_reconstructions
from dae_diffusers.search.candidates import stage1_flags
from dae_diffusers.search.planning import Rung
from dae_diffusers.store import read_json_or, write_json

# What became of a `result.json` that says a failure, once it is tried again.
FORGOTTEN = "failed.json"
BEGUN = "begun.json"  # when a try of a rung began, while it is under way
# Shares of joint training's steps that take its time in two stages: a step of stage 2 costs about 0.7 of one.
_STAGE1, _STAGE2 = 0.6, 0.55


class CandidateTrial:
    r"""
    A candidate of a search.

    Args:
        name (`str`), flags (`dict`): The candidate; `flags` has only `vae` for a published autoencoder.
        experiment (`dict`): `data`, `features`, `num_images`, `guidance_scales`, `num_inference_steps` and `mixed_precision`, which all
            have in common, and `transformer`.
        folder (`Path`): Of the search.
        seed (`int`): Of the search.
        stage1_of (`str`, *optional*): The candidate whose stage 1 this one uses; default: its own.
    """

    def __init__(
        self,
        name: str,
        flags: dict[str, Any],
        experiment: dict[str, Any],
        folder: Path,
        seed: int,
        stage1_of: str | None = None,
    ):
        self.name, self.flags, self.seed = name, flags, seed
        self.experiment = {**experiment, "generators": {"pilot": {}}}
        self.search_folder, self.folder = folder, folder / "trials" / name
        self.launched_seconds = 0.0
        self.stage1 = folder / "trials" / (stage1_of or name) / "stage1"

    def folder_of(self, rung: int) -> Path:
        return self.folder / f"rung-{rung}"

    def result_path(self, rung: int) -> Path:
        return self.folder_of(rung) / "result.json"

    def run(self, number: int, rung: Rung, *, with_generator: bool = True) -> dict[str, Any]:
        r"""
        Trains the autoencoder on to the length of a rung, then a new generator on its latents, and measures them into `result.json`.
        A failure is written there too; the time of those that were forgotten counts, and that of a try that was killed. Returns what was
        written.
        """
        folder, start, processor = self.folder_of(number), time.monotonic(), time.process_time()
        self.launched_seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        lost = self._note_begin(folder)
        try:
            row = self._measure(number, rung, with_generator)
        except (UserError, ValueError, RuntimeError, MemoryError, FloatingPointError) as error:
            row = {"failed": error.reason if isinstance(error, ScriptError) else one_line(error, 300)}
        before = read_json_or(folder / FORGOTTEN, {})
        row |= {
            "rung": rung.to_dict(),
            "seconds": time.monotonic() - start + lost + before.get("seconds", 0.0),
            "processor_seconds": time.process_time()
            - processor
            + self.launched_seconds
            + before.get("processor_seconds", 0.0),
        }
        write_json(self.result_path(number), row)
        (folder / BEGUN).unlink()
        return row

    def _note_begin(self, folder: Path) -> float:
        """Notes that a try of a rung begins. Returns the seconds of those before that were killed: until they wrote their last file."""
        noted = read_json_or(folder / BEGUN, {})
        lost = noted.get("lost", 0.0)
        if noted:
            written = [path.stat().st_mtime for path in self.folder.rglob("*") if path.is_file()]
            lost += max(0.0, max(written) - noted["began"])
        write_json(folder / BEGUN, {"began": time.time(), "lost": lost})
        return lost

    def _measure(self, number: int, rung: Rung, with_generator: bool) -> dict[str, Any]:
        folder = self.folder_of(number)
        vae = self.train_autoencoder(number, rung.autoencoder_steps)
        if "vae" in self.flags:
            data = DataConfig(**self.experiment["data"])
            check_image_size(load_autoencoder(vae), channels=data.image_channels, size=data.size)
        ruler = Ruler(self.experiment, vae, self.seed, self.search_folder / "reference")
        row = {"vae": vae, **ruler.autoencoder()}
        draw_reconstructions(ruler.vae, ruler.validation, folder / "reconstructions.png", count=8)
        if with_generator:
            self._count(cache_latents(self.experiment, vae, folder / "latents"))
            target = folder / "generator"
            row |= train_generator(
                self.experiment,
                "pilot",
                vae,
                folder / "latents",
                target,
                self.seed,
                lr_warmup_steps=self.experiment["transformer"].get("lr_warmup_steps", warmup_of(rung.generator_steps)),
                max_train_steps=rung.generator_steps,
            )
            self._count(row["generator_cost"])
            row["guidance"] = {}
            for scale in self.experiment["guidance_scales"]:
                grid = folder / f"samples-{scale:g}.png"
                row["guidance"][f"{scale:g}"] = ruler.samples(
                    target / "pipeline", target, guidance_scale=scale, grid=grid
                )
                shutil.rmtree(target / "samples")
            row["generation"] = closest(list(row["guidance"].values()))
            best = guidance_of(row)
            write_defaults(
                target / "pipeline",
                guidance_scale=float(best),
                num_inference_steps=self.experiment["num_inference_steps"],
            )
            for grid in folder.glob("samples-*.png"):
                grid.replace(folder / "samples.png") if grid.stem == f"samples-{best}" else grid.unlink()
            for left in (folder / "latents", target / "train_dit" / "checkpoints"):
                shutil.rmtree(left, ignore_errors=True)
        bad = [name for name, value in distances(row).items() if not math.isfinite(value)]
        if bad:
            raise UserError(f"{bad[0]} is not finite.")
        return row

    def train_autoencoder(self, number: int, steps: int) -> str:
        r"""Trains the autoencoder until it has had so many steps of joint training, or their time, and returns its folder."""
        if "vae" in self.flags:
            return self.flags["vae"]
        # Of a length that is not known yet; the first half of joint training is the shortest part.
        constant = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": warmup_of(steps // 2)}
        flags = {**self.experiment["data"], **constant, **self.flags}
        if self.flags.get("auxiliary_decoder") == "none":
            halves = {"stage1_steps": steps // 2, "stage2_steps": steps - steps // 2}
            folder = self.folder / "autoencoder"
            self._count(launch_script("train_dae", {**flags, **halves, **shared_flags(folder, self.seed)}))
            return str(folder / "vae")
        first = {"stage": "1", "stage1_steps": max(1, round(_STAGE1 * steps))}
        self.train_stage1({**stage1_flags(flags), **first, **shared_flags(self.stage1, self.seed)})
        # The encoder has moved on, so that the decoder of the rung before does not fit: it begins again.
        second = {
            "stage": "2",
            "stage1_dir": str(self.stage1),
            "stage2_steps": max(1, round(_STAGE2 * steps)),
        }
        folder = self.folder_of(number) / "autoencoder"
        self._count(launch_script("train_dae", {**flags, **second, **shared_flags(folder, self.seed)}))
        return str(folder / "vae")

    def train_stage1(self, flags: dict[str, Any]) -> None:
        r"""Trains stage 1 to so many steps, unless it has them: candidates that differ in their stage 2 share it."""
        name = f"{flags['stage1_steps']}-steps"
        finished = self.stage1 / f"{name}.json"

        def train() -> None:
            self._count(launch_script("train_dae", flags))
            write_json(finished, {})

        do_once(name, self.stage1, finished.exists, train)

    def _count(self, cost: dict[str, float]) -> None:
        """Adds the processor time of a script, which is not this process's."""
        self.launched_seconds += cost["cpu_seconds"]


def closest(generations: list[dict[str, Any]]) -> dict[str, Any]:
    r"""The samples with the lowest gFD, of those of several guidance scales. One that is not finite is chosen only if all are."""

    def order(generation: dict[str, Any]) -> float:
        found = distances({"generation": generation})["gFD"]
        return found if math.isfinite(found) else math.inf

    return min(generations, key=order)


def guidance_of(row: dict[str, Any]) -> str | None:
    r"""The guidance scale of a result that counts: that of the lowest gFD. None where none is known."""
    scales = [scale for scale, found in row.get("guidance", {}).items() if found == row["generation"]]
    return scales[0] if scales else None


def distances(row: dict[str, Any]) -> dict[str, float]:
    r"""PSNR, rFD, gFD and gap of a result, as far as they were measured."""
    found = {}
    reconstruction, generation = row.get("reconstruction", {}), row.get("generation", {})
    for name, values, prefixes in (
        ("PSNR", reconstruction, ("psnr",)),
        ("rFD", reconstruction, ("rfd", "rfid")),
        ("gFD", generation, ("gfd", "gfid")),
        ("gap", generation, ("gap",)),
    ):
        for key, value in values.items():
            if key.startswith(prefixes):
                found[name] = math.nan if value is None else value
    return found
