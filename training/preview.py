r"""
Draw what training will see of your images: crops, classes and counts. Trains nothing.

    dae-diffusers preview --config photos_64_dae --train_data_dir my_images --output_dir runs/mine/preview

`preview.png` shows for each class whole pictures, with what the crop leaves out darkened, and below them what training gets, with the
images of `--condition_column`. `preview.md` counts the images of each class of each label column, says how large the files are and
which numbers there are, and shows some captions. It also counts copies, which `copies.png` shows and `copies.csv` names. Give the flags
that you will train with: those of the images count, the others are passed over.
"""

import logging
from pathlib import Path

from dae_diffusers.autoencoders.loading import load_autoencoder, settle_images
from dae_diffusers.cli import parse_config
from dae_diffusers.data import StreamedImages, load_images
from dae_diffusers.data.arrays import read_value_range
from dae_diffusers.data.dataset import choose_indices
from dae_diffusers.locks import mark_folder
from dae_diffusers.preview import LOOKED_AT, captions, conditions, counts, draw, groups, look, of_each_class, sizes
from dae_diffusers.preview_copies import describe_copies, draw_copies, find_copies, table_of_copies
from dae_diffusers.script import run_script, show_messages
from dae_diffusers.store import write_atomically
from dae_diffusers.training.settings import PreviewConfig

logger = logging.getLogger(__name__)


def main(config: PreviewConfig) -> None:
    show_messages()
    folder, seed = Path(config.preview.output_dir), config.preview.seed
    mark_folder(folder)  # before the images are read, which may take long
    if config.preview.vae is None:
        config.data.settle()
    else:
        settle_images(config, load_autoencoder(config.preview.vae))
    train, validation = load_images(config.data, value_range=read_value_range(config.preview.vae))
    indices = () if isinstance(train, StreamedImages) else choose_indices(len(train), LOOKED_AT)
    looked = list(look(train, seed, indices))
    table = (
        counts(train, validation, looked)
        + groups(train, validation)
        + conditions(train)
        + captions(train)
        + "\n"
        + sizes(looked, train.buckets, are_padded=config.data.pad is not None)
    )
    table += "".join(f"\n{text[0].upper()}{text[1:]}\n" for text in train.range_warnings)
    picture = draw(
        of_each_class(train, seed, config.preview.num_images),
        train.id2label,
        shows_crop=not config.data.crops_at_random and config.data.pad is None,
    )
    pairs = []
    if config.preview.num_compared and not isinstance(train, StreamedImages):
        copies = find_copies(train, validation, config.preview.num_compared)
        pairs, table = copies.pairs, table + describe_copies(copies)
    picture.save(folder / "preview.png")
    for name in ("copies.png", "copies.csv"):  # of an earlier preview
        (folder / name).unlink(missing_ok=True)
    if pairs:
        draw_copies(pairs).save(folder / "copies.png")
        write_atomically(folder / "copies.csv", table_of_copies(pairs))
    write_atomically(folder / "preview.md", table)
    logger.info("\n%s\nwritten to %s", table, folder)


if __name__ == "__main__":
    run_script(main, parse_config(PreviewConfig, description=__doc__))
