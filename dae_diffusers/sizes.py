"""Heights and widths, in pixels or latent pixels."""

from collections.abc import Sequence


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    r"""A size in pixels, or in latent pixels, as a pair: a number is the side of a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def words_of_size(size: int | Sequence[int]) -> str:
    r"""A size as "64x96", height first."""
    return "{}x{}".format(*height_and_width(size))


def nearest_multiples(side: int, factor: int) -> str:
    r"""A sentence for a side that no whole number of latents covers."""
    return f"The nearest valid ones are {max(1, side // factor) * factor} and {(side // factor + 1) * factor}."
