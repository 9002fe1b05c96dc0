"""What the results of a folder were made with."""

import json
from pathlib import Path
from typing import Any

from dae_diffusers.errors import UserError
from dae_diffusers.store import read_json, write_json


def check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    r"""
    Keeps what the results of a folder were made with, in a JSON file.

    Raises:
        UserError: If the file says something else: results of before would be taken for those of these settings.
    """
    kept = read_json(path) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, with_kept(kept, settings, f"{path.parent} holds results of other settings"))


def with_kept(kept: dict[str, Any], this: dict[str, Any], conflict: str) -> dict[str, Any]:
    r"""What was kept, and this, as JSON holds it. Raises `UserError` with the words of a conflict if they contradict each other."""
    this = json.loads(json.dumps(this, default=str))
    for name in kept.keys() & this.keys():
        if kept[name] != this[name]:
            raise UserError(
                f"{conflict}: `{name}` was {kept[name]} and is {this[name]}. Choose another `--output_dir`."
            )
    return kept | this
