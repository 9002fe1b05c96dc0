"""Pictures as files hold them."""

import io

from PIL import Image


def encoded(image: Image.Image, format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
