"""What stage 3 leaves beside the weights of a decoder that it fitted to a generator."""

from pathlib import Path
from typing import Any

from dae_diffusers.repository_files import find_file
from dae_diffusers.store import read_json_or, sha256_of, write_json

FIT_FILE = "stage3.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_fit(folder: Path, weights_folder: Path, described: dict[str, Any]) -> None:
    r"""
    Writes [`FIT_FILE`].

    Args:
        folder (`Path`): The autoencoder's folder.
        weights_folder (`Path`): Where the fitted weights lie now. The record holds for these weights alone.
        described (`dict`): How the decoder was fitted.
    """
    write_json(folder / FIT_FILE, {**described, "weights_sha256": sha256_of(weights_folder / _WEIGHTS)})


def read_fit(name_or_path: str | Path) -> dict[str, Any]:
    r"""
    How the decoder of a pipeline or of an autoencoder was fitted to a generator. Empty if it was not, and if the record in a folder is
    that of other weights: a generator may have been trained again, and saved over it.

    Args:
        name_or_path (`str` or `Path`): A folder, or a repository on the Hub.
    """
    for name in (f"vae/{FIT_FILE}", FIT_FILE):
        path = find_file(str(name_or_path), name)
        if path is None:
            continue
        record, weights = read_json_or(path, {}), path.with_name(_WEIGHTS)
        is_local = Path(name_or_path).is_dir() and weights.exists()
        return {} if is_local and record.get("weights_sha256") != sha256_of(weights) else record
    return {}
