"""The newest checkpoint of a run on the Hub, so that the run can go on on another machine."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from dae_diffusers.engine.checkpointing import MANIFEST, Checkpointer, read_manifest, verify
from dae_diffusers.errors import UserError
from dae_diffusers.hub import upload
from dae_diffusers.hub.card import EXAMPLES, without_origin
from dae_diffusers.hub.publisher import Publisher
from dae_diffusers.settings import without_paths
from dae_diffusers.store import read_json

logger = logging.getLogger(__name__)

# What a run needs from its folder, beside a checkpoint, to end as if it had never been interrupted. Not its grids: they show the data.
_NEEDED = ("log.jsonl", "run.json", "tracker.json", "best", "guidance_transformer", "post_hoc_ema")


class HubCheckpoints:
    r"""
    Keeps a run's newest checkpoint, and what else it needs to go on, on a branch of its repository. The files lie there as in the output
    folder, and nothing else does. Lives on the main process of a run with `hub_strategy checkpoint`.

    Args:
        publisher ([`~dae_diffusers.hub.publisher.Publisher`]): Of the run.
        checkpointer ([`~dae_diffusers.engine.checkpointing.Checkpointer`]): Of the run.
    """

    def __init__(self, publisher: Publisher, checkpointer: Checkpointer):
        self.publisher, self.checkpointer = publisher, checkpointer
        self.output_dir, self.folder = publisher.output_dir, checkpointer.folder.parent
        self.repo_id, self.branch = publisher.repo_id, f"checkpoint-{self.folder.name}"
        self._needed = [self.folder / name for name in _NEEDED]
        self._needed += [self.output_dir / "stage1"] if self.folder.name == "train_dae" else []
        self._newest: tuple[Path, int] | None = None

    def fetch(self, resume: str | None) -> None:
        r"""
        With `latest`: downloads the checkpoint on the Hub into the output folder, if that has none or an older one.

        Args:
            resume (`str`, *optional*): What `resume_from_checkpoint` says.

        Raises:
            UserError: If the Hub has a checkpoint that this run does not go on from, but would replace; or if there is none in the output
                folder, and that on the Hub cannot be read or is damaged.
        """
        mine = self.checkpointer.newest_manifest() if resume == "latest" else resume and read_manifest(Path(resume))
        try:
            found = self._published()
        except UserError:
            raise
        except Exception as error:  # a connection may fail in any way
            if resume == "latest" and mine is None:
                raise UserError(
                    f"{self._place} cannot be read ({upload.reason_of(error)}), so it is not known whether there is a checkpoint to go on "
                    "from. Give the same command again when the Hub answers; to begin at step 0, leave out `resume_from_checkpoint`."
                ) from None
            logger.warning("%s cannot be read now (%s).", self._place, upload.reason_of(error))
            return
        if found is None:
            if resume == "latest" and mine is None:
                logger.info("%s has no checkpoint.", self._place)
            return
        name, theirs = found
        if resume is None:
            raise UserError(
                f"{self._place} has the checkpoint of step {theirs['step']}, which this run would replace. Go on from it with "
                f"`resume_from_checkpoint latest`, choose another `hub_model_id`, or {self._how_to_remove}."
            )
        self._check_is_of_run(theirs, mine)
        if resume == "latest" and (mine is None or mine["step"] < theirs["step"]):
            logger.info("downloading the checkpoint of step %d from %s", theirs["step"], self._place)
            self._download(name)

    def push(self, checkpoint: Path, step: int) -> None:
        r"""
        Uploads a checkpoint in the background, in the place of the one before. Does nothing while an upload is running.

        Args:
            checkpoint (`Path`): Its folder.
            step (`int`): Optimiser steps done.
        """
        self._newest = (checkpoint, step)
        self.publisher.background.start(
            step,
            save=lambda folder: self._gather(checkpoint, folder),
            push=lambda folder: self._push(folder, step),
        )

    def finish(self) -> None:
        r"""Waits until the newest checkpoint is on the Hub; uploads it if that has not been done. Says so if it fails."""
        if self._newest is None:
            return
        background, (checkpoint, step) = self.publisher.background, self._newest
        if background.is_running or background.uploaded != step:
            logger.info("uploading the checkpoint of step %d to %s", step, self._place)
        background.wait()
        if background.uploaded != step:
            self.push(checkpoint, step)
            background.wait()
        if background.uploaded != step:
            logger.warning("the checkpoint of step %d is not in %s (%s).", step, self._place, background.failures[-1])

    @property
    def _place(self) -> str:
        return f"{self.repo_id} (branch {self.branch})"

    @property
    def _how_to_remove(self) -> str:
        return f"remove it: hf repos branch delete {self.repo_id} {self.branch}"

    def _published(self) -> tuple[str, dict[str, Any]] | None:
        """The folder of the checkpoint on the Hub, and its manifest; None if there is none. Raises what the connection fails with."""
        api, start = HfApi(), f"{self.folder.name}/{self.checkpointer.folder.name}/"
        try:
            info = api.model_info(
                self.repo_id, revision=self.branch, timeout=upload.CHECK_SECONDS
            )  # it does not try again
        except RevisionNotFoundError:
            return None
        names = (file.rfilename for file in info.siblings)
        name = next((name for name in names if name.startswith(start) and name.endswith(f"/{MANIFEST}")), None)
        if name is None:
            return None
        folder = name.rpartition("/")[0]
        manifest = read_manifest(Path(api.hf_hub_download(self.repo_id, name, revision=self.branch)).parent)
        if manifest is None:
            raise self._damaged(f"its {MANIFEST} cannot be read")
        return folder, manifest

    def _check_is_of_run(self, theirs: dict[str, Any], mine: dict[str, Any] | None) -> None:
        if mine is not None and mine.get("run") != theirs.get("run"):
            raise UserError(
                f"{self._place} has a checkpoint of another run, of step {theirs['step']}, which stays. Choose another `hub_model_id`, or "
                f"{self._how_to_remove}."
            )

    def _damaged(self, problem: str) -> UserError:
        return UserError(
            f"the checkpoint in {self._place} is damaged: {problem}. To begin again, {self._how_to_remove}."
        )

    def _download(self, name: str) -> None:
        """Puts everything into the output folder, the checkpoint last, once it is known to be whole."""
        place = self.folder / "hub"
        shutil.rmtree(place, ignore_errors=True)
        wanted = [f"{path.relative_to(self.output_dir).as_posix()}*" for path in self._needed]
        try:
            with upload.waiting_at_most():
                HfApi().snapshot_download(
                    self.repo_id, revision=self.branch, local_dir=place, allow_patterns=[f"{name}/*", *wanted]
                )
            problem, _ = verify(place / name)
            if problem:
                raise self._damaged(problem)
            for needed in self._needed:
                for path in _files_in(place / needed.relative_to(self.output_dir)):
                    target = self.output_dir / path.relative_to(place)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
            self.checkpointer.adopt(place / name)
        except UserError:
            raise
        except Exception as error:  # a connection may fail in any way, and the disk be full
            raise UserError(
                f"the checkpoint in {self._place} cannot be downloaded ({upload.reason_of(error)}). Give the same command again."
            ) from None
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _gather(self, checkpoint: Path, folder: Path) -> None:
        """Puts all files into a folder, laid out as in the output folder, without what tells of this machine or shows the data."""
        for path in (path for place in (checkpoint, *self._needed) for path in _files_in(place)):
            target = folder / path.relative_to(self.output_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = path
            if path == self.folder / "run.json":
                record = {name: value for name, value in read_json(path).items() if name not in EXAMPLES}
                content = json.dumps(without_paths(record), indent=2).encode()
            elif path.suffix == ".json" and checkpoint not in path.parents:
                content = without_origin(path)
            if isinstance(content, bytes):
                target.write_bytes(content)
            elif path.suffix == ".jsonl":  # it grows during the upload
                shutil.copyfile(path, target)
            else:
                _link(path, target)

    def _push(self, folder: Path, step: int) -> None:
        found = self._published()
        if found is not None:
            (mine,) = folder.rglob(MANIFEST)
            self._check_is_of_run(found[1], read_manifest(mine.parent))
        upload.replace_branch(
            self.repo_id,
            self.branch,
            {path.relative_to(folder).as_posix(): path for path in _files_in(folder)},
            message=f"Checkpoint of step {step}",
            private=self.publisher.config.hub_private_repo,
            forgets=True,
        )


def _files_in(place: Path) -> list[Path]:
    """The files below a folder; for a file, the file itself."""
    return [path for path in ([place] if place.is_file() else sorted(place.rglob("*"))) if path.is_file()]


def _link(path: Path, target: Path) -> None:
    """The same file under a second name, so that it outlives the first one; a copy where the disk has no links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
