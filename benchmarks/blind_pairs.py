"""
Does a person prefer the decoder of stage 3? Draws a sheet of pairs, the same latents decoded before and after stage 3, in random
order, and counts the answers:

    python benchmarks/blind_pairs.py runs/mine/pipeline runs/mine/blind --guidance_scale 2
    python benchmarks/blind_pairs.py runs/mine/pipeline runs/mine/blind --answers "LRRL.L..."

An answer is L or R for the better picture of a pair, or a dot for no difference, in the order of the sheet (rows of eight pairs).
"""

import argparse
import json
import math
from pathlib import Path

import torch

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.fitting.decoder_fit import KEPT_VAE
from dae_diffusers.plots import image_grid

_COLUMNS = 8  # pairs in a row


@torch.no_grad()
def draw_pairs(folder: Path, number: int, guidance_scale: float, seed: int) -> torch.Tensor:
    r"""The same latents decoded before and after stage 3, `(number, 2, C, H, W)` in [-1, 1]."""
    pipeline = DAEDiTPipeline.from_pretrained(folder)
    classes = pipeline.null_class
    labels = (
        {"num_images_per_label": number} if classes is None else {"class_labels": [n % classes for n in range(number)]}
    )
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 25, "output_type": "latent"}
    latents = pipeline(**labels, **options, generator=torch.Generator().manual_seed(seed)).images
    decoders = [load_autoencoder(str(folder.parent / KEPT_VAE)).eval(), pipeline.vae]
    return torch.stack([vae.decode(latents).sample.clamp(-1, 1) for vae in decoders], dim=1)


def sign_test(wins: int, number: int) -> float:
    r"""Two-sided p-value of so many wins if both decoders were equally good."""
    rarer = min(wins, number - wins)
    return min(1.0, 2 * sum(math.comb(number, each) for each in range(rarer + 1)) / 2**number)


def main(arguments: argparse.Namespace) -> None:
    folder, key = arguments.folder, arguments.folder / "key.json"
    if arguments.answers is not None:
        swapped, answers = json.loads(key.read_text()), "".join(arguments.answers.split()).upper()
        if len(answers) != len(swapped) or set(answers) - set("LR."):
            raise SystemExit(f"give {len(swapped)} answers, each L, R or a dot; {len(answers)} were given.")
        after = sum(
            (answer == "L") == is_swapped for answer, is_swapped in zip(answers, swapped, strict=True) if answer != "."
        )
        told = len(answers) - answers.count(".")
        test = f", p = {sign_test(after, told):.2g} (two-sided)" if told else ""
        print(f"of {len(answers)} pairs {told} were told apart; {after} times stage 3 was better{test}")
        return
    pairs = draw_pairs(arguments.pipeline, arguments.number, arguments.guidance_scale, arguments.seed)
    torch.seed()  # another order each time
    swapped = torch.rand(len(pairs)) < 0.5
    shown = torch.where(swapped[:, None, None, None, None], pairs.flip(1), pairs)
    gap = torch.ones_like(shown[:, :1])
    folder.mkdir(parents=True, exist_ok=True)
    image_grid(torch.cat((shown, gap), dim=1).flatten(0, 1), columns=3 * _COLUMNS).save(folder / "sheet.png")
    key.write_text(json.dumps(swapped.tolist()))
    print(f"look at {folder / 'sheet.png'}: pairs in rows of {_COLUMNS}, then give --answers.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="pipeline that stage 3 has made")
    parser.add_argument("folder", type=Path, help="folder for the sheet and its key")
    parser.add_argument("--number", type=int, default=64, help="pairs (default: 64)")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", help="your answers, to be counted")
    main(parser.parse_args())
