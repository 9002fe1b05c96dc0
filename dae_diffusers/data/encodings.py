"""Decodes files of text."""

import codecs


def decode_text(data: bytes) -> str:
    r"""
    The text of a file: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        ValueError: If it is another encoding, which cannot be told from the bytes.
    """
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        seen = f"the byte 0x{data[error.start]:02x} at {error.start} is not {'UTF-16' if is_wide else 'UTF-8'}"
        raise ValueError(f"{seen}. Save it as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8`") from None
