r"""
Images turned by 0, 90, 180 and 270 degrees, with the turn as their label: data for a judge that has seen no class.

    python benchmarks/make_rotations.py my_other_images runs/rotations --resolution 32
    dae-diffusers train-classifier --dataset_name runs/rotations --resolution 32 --output_dir features/rotations

A network that learns to tell the turn is self-supervised. Trained on other images than the generator's, it judges in another way
than a classifier of the generator's own data: a gain that only the classifier sees is none.
"""

import argparse
from pathlib import Path

from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.script import run_script
from dae_diffusers.search.turned import write_turned


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a data set: a folder, or a name on the Hub")
    parser.add_argument("output_dir", type=Path, help="where to write Parquet files, for `--dataset_name`")
    parser.add_argument("--resolution", type=int, default=32, help="height and width of the images")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    config = DataConfig(dataset_name=arguments.images, resolution=arguments.resolution, label_column="none")
    write_turned(load_images(config), arguments.output_dir)


if __name__ == "__main__":
    run_script(main, parse_arguments())
