"""
How well does `dae-diffusers preview` find near copies? For a data set, counts the images that it takes for copies of others, and the
copies that it finds when images are saved again. Beside it, the same for a 64-bit difference hash with a distance of at most 3. It takes
minutes.

    python benchmarks/near_copies.py digits --resolution 32 --image_channels 1
    python benchmarks/near_copies.py uoft-cs/cifar10 --resolution 32
"""

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dae_diffusers.data import DataConfig, ImageDataset, load_images
from dae_diffusers.data.near_copies import first_alike, thumbnail

_SAVED = 2000  # images that are saved again
_DISTANCE = 3


def saved_again(image: Image.Image, quality: int, scale: float) -> Image.Image:
    r"""The image as a JPEG of another size, read and scaled back."""
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    scaled.save(file, "jpeg", quality=quality)
    return Image.open(file).convert(image.mode).resize(image.size, Image.Resampling.BICUBIC)


def as_pixel_values(image: Image.Image) -> torch.Tensor:
    r"""As training gets it, `(C, H, W)` in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def difference_hash(pixel_values: torch.Tensor) -> np.ndarray:
    r"""Whether each of 8 x 8 parts is brighter than its left neighbour, `(64,)` float32."""
    parts = F.adaptive_avg_pool2d(pixel_values.mean(dim=0)[None], (8, 9))[0]
    return (parts[:, 1:] > parts[:, :-1]).flatten().float().numpy()


def first_of_equal_hash(hashes: np.ndarray) -> np.ndarray:
    r"""For each image the first whose hash differs in at most 3 bits. Slow: it compares all pairs."""
    firsts = []
    for start in range(0, len(hashes), 500):
        some = hashes[start : start + 500]
        distance = some.sum(axis=1)[:, None] + hashes.sum(axis=1)[None] - 2 * some @ hashes.T
        firsts.append((distance <= _DISTANCE).argmax(axis=1))
    return np.concatenate(firsts)


def measure(
    images: ImageDataset,
    describe: Callable[[torch.Tensor], np.ndarray],
    find: Callable[[np.ndarray], np.ndarray],
    ways: list[tuple[int, float]],
) -> list[str]:
    r"""The cells of a row of the table: images taken for copies of images that differ, and the share that is found of each way to save."""
    pixel_values = [images[index]["pixel_values"] for index in range(len(images))]
    described = np.stack([describe(each) for each in pixel_values])
    start = time.perf_counter()
    firsts = find(described)
    seconds = time.perf_counter() - start
    wrong = [
        number for number, first in enumerate(firsts) if not torch.equal(pixel_values[number], pixel_values[first])
    ]
    chosen = np.random.default_rng(0).permutation(len(images))[:_SAVED]
    pictures = [((pixel_values[n].squeeze(0) + 1) * 127.5).round().to(torch.uint8).numpy() for n in chosen]
    pictures = [Image.fromarray(each if each.ndim == 2 else each.transpose(1, 2, 0)) for each in pictures]
    found = []
    for way in ways:
        again = np.stack([describe(as_pixel_values(saved_again(each, *way))) for each in pictures])
        # Only the image itself counts.
        pairs = np.stack((described[chosen], again), axis=1)
        found.append(np.mean([find(pair)[1] == 0 for pair in pairs]))
    return [
        f"{len(wrong)} ({len(wrong) / len(images):.2%})",
        *(f"{share:.1%}" for share in found),
        f"{seconds:.1f} s",
    ]


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    config = DataConfig(
        dataset_name=arguments.dataset_name, resolution=arguments.resolution, image_channels=arguments.image_channels
    )
    images, _ = load_images(config)
    ways = [(50, 1.0), (75, 1.0), (90, 1.0), (90, 0.75), (75, 1.5)]
    names = " | ".join(
        f"quality {quality}" + ("" if scale == 1 else f", {scale:g} x the size") for quality, scale in ways
    )
    print(f"{len(images)} images of {arguments.dataset_name}\n")
    print(f"| | taken for copies | {names} | time |\n|---|---|{'---|' * len(ways)}---|")
    for name, describe, find in (
        ("thumbnails", thumbnail, first_alike),
        ("difference hash", difference_hash, first_of_equal_hash),
    ):
        print(f"| {name} | {' | '.join(measure(images, describe, find, ways))} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="as `--dataset_name`")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--image_channels", type=int, default=3, choices=(1, 3))
    main(parser.parse_args())
