"""Which picture files are read, and how Pillow reads them."""

import functools
import io
import re
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow knows more formats, but it starts Ghostscript for PostScript and cannot decode GRIB, HDF5 and the like.
FORMATS = (
    *("AVIF", "BMP", "CUR", "DDS", "DIB", "FITS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM"),
)
SUFFIXES = frozenset(
    ".apng .avif .bmp .bw .cur .dds .dib .fit .fits .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .pbm .pcx .pfm "
    ".pgm .png .pnm .ppm .psd .qoi .ras .rgb .rgba .sgi .tga .tif .tiff .webp .xbm".split()
)
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
INSTALL_HEIF = "pip install pillow-heif"
# Pictures that other programs read. If one is left out, the user should be warned.
OTHER_SUFFIXES = frozenset(
    ".3fr .ai .arw .blp .cr2 .cr3 .dcm .dng .emf .eps .erf .exr .gbr .grib .hdf .hdr .icns .im .jxl .jxr .mpo .nef .nii .orf .pcd "
    ".pdf .ps .raf .raw .rw2 .srw .svg .wmf .xcf .xpm".split()
)

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
_WHITE_IS_ZERO = 0  # PhotometricInterpretation of a TIFF
_ROTATIONS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts of a PNG that may say how to turn it


def open_picture(data: bytes) -> Image.Image:
    r"""
    Opens a picture file without decoding it, with one of Pillow's decoders that run no other program.

    Raises:
        ValueError: For HEIC files without `pillow-heif`, and for files that are no pictures.
        Exception: Whatever Pillow raises for data that it cannot read.
    """
    formats = list(FORMATS)
    if _is_heif(data):
        if not reads_heif():
            raise ValueError(f"it is a HEIC file, which needs `{INSTALL_HEIF}`")
        formats = ["HEIF", "AVIF"]
    if data.startswith(_PNG_MAGIC):
        data = _without_texts(data)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        if data.startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer: get the pictures by `git lfs pull`") from None
        raise ValueError("it is not a picture in a supported format") from None
    if image.format == "FITS" and image.tile and image.tile[0][0] == "fits_gzip":
        raise ValueError("it is a compressed FITS file; save it as `.npy` or TIFF")
    return image


def decode_picture(image: Image.Image) -> Image.Image:
    r"""Decodes a picture that [`open_picture`] has opened, turned as its EXIF data say. Of gray ones the highest value is white."""
    # Pillow inverts files whose 0 is white, but not those of 16 bits.
    is_negative = (
        image.mode.startswith("I;16")
        and getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO
    )
    image.load()
    image = ImageOps.exif_transpose(image)
    return Image.fromarray(~np.asarray(image)) if is_negative else image


@functools.cache
def reads_heif() -> bool:
    r"""Whether `pillow-heif` is installed; it is registered with Pillow then."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def precisions(image: Image.Image, data: bytes) -> tuple[int, bool]:
    r"""
    The bits per channel of an opened file, and whether they are signed, for files where Pillow hides this: it reads JPEG 2000 with
    several deep channels, and signed TIFF and FITS, as if they were 8-bit or unsigned.

    Returns:
        `tuple[int, bool]`: `(8, False)` where the file does not say.
    """
    if image.format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51")  # the code stream's first two markers
        try:
            (count,) = struct.unpack_from(">H", data, start + 4 + 36)
            components = [data[start + 4 + 38 + 3 * number] for number in range(count)]
        except (struct.error, IndexError):
            return 8, False
        return max((value & 0x7F) + 1 for value in components), any(value & 0x80 for value in components)
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        return max(tags.get(258, (8,))), 2 in _as_tuple(tags.get(339, (1,)))
    if image.format == "FITS":
        return (16, True) if image.mode.startswith("I;16") else (8, False)
    if image.format == "SGI" and image.tile and image.tile[0][0] == "SGI16":
        return 16, False
    return 8, False


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _is_heif(data: bytes) -> bool:
    if data[4:8] != b"ftyp":
        return False
    brands = {data[8:12], *re.findall(b"....", data[16 : int.from_bytes(data[:4], "big")][:256], re.DOTALL)}
    return data[8:12] in _HEIF_BRANDS and not brands & {b"avif", b"avis"}


def _without_texts(data: bytes) -> bytes:
    """
    Removes the texts and the colour profile of a PNG. Nothing here uses them, and Pillow refuses large ones. Texts that
    may hold EXIF data stay.
    """
    parts, start, position = [], 0, len(_PNG_MAGIC)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end, name = position + 12 + length, data[position + 4 : position + 8]
        if name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") and not (
            name != b"iCCP" and _turns(data[position + 8 : end - 4], name)
        ):
            parts.append(data[start:position])
            start = end
        position = end
    return b"".join([*parts, data[start:]]) if parts else data


def _turns(text: bytes, name: bytes) -> bool:
    """Whether it is one of the texts with EXIF data, of a size that Pillow reads."""
    keyword, _, rest = text.partition(b"\0")
    if keyword not in _ROTATIONS:
        return False
    if name == b"iTXt" and rest[:1] == b"\1":
        rest = rest[2:].split(b"\0", 2)[-1]
    elif name == b"zTXt":
        rest = rest[1:]
    else:
        return len(rest) < 2**20
    try:
        return len(zlib.decompressobj().decompress(rest, 2**20)) < 2**20
    except zlib.error:
        return False
