"""Uploads a training run: access is checked before training starts, snapshots are uploaded during it, the result at the end."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from dae_diffusers.hub import upload
from dae_diffusers.hub.results import UNFINISHED
from dae_diffusers.hub.settings import HubConfig
from dae_diffusers.store import read_json_or, write_json

logger = logging.getLogger(__name__)

_ABOUT_A_RUN = ("config.yaml", "run.json", "log.jsonl", "curves.png", "grids")  # the files that a card is made from


class Publisher:
    r"""
    Lives on the main process of a run with `push_to_hub`.

    Args:
        config ([`~dae_diffusers.hub.settings.HubConfig`]): Repository, license, strategy.
        output_dir (`Path`): Folder of the run's results.
        folder (`Path`): Folder of the script's own files, where snapshots lie during the upload.

    Attributes:
        repo_id (`str`): The full `user/name`.
        background ([`~dae_diffusers.hub.upload.BackgroundUpload`]): Uploads during training.

    Raises:
        UserError: If the Hub does not let this token write to the repository.
    """

    def __init__(self, config: HubConfig, output_dir: Path, folder: Path):
        self.config = config
        self.output_dir = output_dir
        self.repo_id = upload.check_hub_access(
            config.hub_model_id or output_dir.resolve().name,
            private=config.hub_private_repo,
            license=config.hub_license,
        )
        self.background = upload.BackgroundUpload(folder / "hub")

    def push_snapshot(self, step: int, result: str, save: Callable[[Path], None]) -> None:
        r"""
        With `hub_strategy every_save`: uploads the present state of the model in the background.

        Args:
            step (`int`): Optimiser steps done.
            result (`str`): Name of the folder, such as `vae`.
            save: Function that writes the model into a path.
        """
        if self.config.hub_strategy == "every_save":
            self.background.start(
                step,
                save=lambda folder: self._save_snapshot(folder, result, save),
                push=lambda folder: self._push(folder / result, step),
            )

    def push_result(self, result: str) -> None:
        r"""Waits for the snapshots and uploads a result. If an upload fails, a warning gives the command for later."""
        if self.background.is_running:
            logger.info("waiting for the upload of the last checkpoint")
        self.background.wait()
        folder = self.output_dir / result
        try:
            logger.info("pushed to %s", self._push(folder))
        except Exception as error:  # an upload may fail in any way; the run has ended well
            logger.warning(
                "pushing to %s failed (%s). Everything is in %s; push it with\n  %s",
                self.repo_id,
                upload.reason_of(error),
                folder,
                upload.push_command(
                    folder, self.repo_id, private=self.config.hub_private_repo, license=self.config.hub_license
                ),
            )

    def _push(self, folder: Path, step: int | None = None) -> str:
        private, license = self.config.hub_private_repo, self.config.hub_license
        if folder.name == "stage1":
            return upload.push_stage1(folder.parent, self.repo_id, private=private)
        return upload.push_folder(folder, self.repo_id, private=private, license=license, step=step)

    def _save_snapshot(self, folder: Path, result: str, save: Callable[[Path], None]) -> None:
        """Saves the result, and the files that the card is made from."""
        save(folder / result)
        for path in self.output_dir.glob("train_*"):
            for name in _ABOUT_A_RUN:
                if (path / name).is_dir():
                    shutil.copytree(path / name, folder / path.name / name)
                elif (path / name).exists():
                    (folder / path.name).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path / name, folder / path.name / name)
            record = read_json_or(folder / path.name / "run.json", {})
            if record.pop(UNFINISHED, False):  # the snapshot is of the weights that are being trained
                write_json(folder / path.name / "run.json", record)
