"""Finds small files of a model, in a folder or in a repository on the Hub."""

import logging
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dae_diffusers.errors import one_line

logger = logging.getLogger(__name__)

_unreachable: set[str] = set()  # repositories from which nothing could be fetched


def find_file(name_or_path: str, name: str) -> Path | None:
    r"""
    A file of a local folder or of a repository on the Hub; None if it is not there, or cannot be fetched. The latter is said, once for
    each repository.
    """
    path = Path(name_or_path) / name
    if Path(name_or_path).is_dir():
        return path if path.is_file() else None
    if name_or_path in _unreachable:  # each try takes half a minute
        cached = try_to_load_from_cache(name_or_path, name)
        return Path(cached) if isinstance(cached, str) else None
    try:
        return Path(hf_hub_download(name_or_path, name))
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
        return None  # no Hub id, or nothing there
    except (HfHubHTTPError, EntryNotFoundError) as error:
        if not constants.HF_HUB_OFFLINE:
            _unreachable.add(name_or_path)
            logger.warning(
                "what %s says of its images, and of a decoder that was fitted, could not be fetched; only what is in the cache counts: %s",
                name_or_path, one_line(error, 200),
            )  # fmt: skip
        return None
