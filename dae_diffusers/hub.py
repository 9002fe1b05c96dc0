"""Pushing a result to the Hub."""

import logging
from pathlib import Path

from huggingface_hub import create_repo, upload_folder, whoami
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from dae_diffusers.cli import UserError

logger = logging.getLogger(__name__)


def check_hub_access(repo_id: str, *, private: bool = False) -> str:
    r"""
    Makes the repository before training starts, so that a missing token or permission shows at once.

    Args:
        repo_id (`str`): `user/name`, or `name` in the account of the token.
        private (`bool`, *optional*): Whether a new repository is private.

    Returns:
        `str`: The full `user/name`.

    Raises:
        UserError: If the Hub does not let this token write there, or does not answer.
    """
    try:
        whoami()
        return create_repo(repo_id, private=private, exist_ok=True).repo_id
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"`--push_to_hub`: {repo_id} cannot be written on the Hub ({reason}). Log in with `hf auth login`, choose "
            "another `--hub_model_id`, or train without `--push_to_hub` and push afterwards."
        ) from None


def push_folder(folder: Path, repo_id: str) -> None:
    r"""Uploads a folder. If that fails, says why and how to do it later: what was trained is on disk."""
    try:
        upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f"Upload {folder.name}")
        logger.info("pushed %s to %s", folder, repo_id)
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.error(
            "pushing to %s failed (%s). Everything is in %s; push it with\n  hf upload %s %s",
            repo_id,
            " ".join(str(error).split())[:300],
            folder,
            repo_id,
            folder,
        )
