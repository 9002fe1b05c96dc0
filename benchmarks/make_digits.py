"""
Makes the embedded digits, `dae_diffusers/assets/digits_{train,test}.parquet`, from the copy that scikit-learn bundles.

    pip install scikit-learn && python benchmarks/make_digits.py
"""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_TRAIN = 1500
ASSETS = Path(__file__).resolve().parents[1] / "dae_diffusers" / "assets"


def to_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)).save(buffer, "png", optimize=True)  # levels 0..16
    return buffer.getvalue()


def main():
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
    )
    for split, indices in (("train", order[:NUM_TRAIN]), ("test", order[NUM_TRAIN:])):
        rows = {
            "image": [{"bytes": to_png(digits.images[i]), "path": None} for i in indices],
            "label": [int(digits.target[i]) for i in indices],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(ASSETS / f"digits_{split}.parquet")


if __name__ == "__main__":
    main()
