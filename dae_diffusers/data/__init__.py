"""Images from a Hub dataset, a folder, a stream or the embedded digits to `pixel_values` in [-1, 1] and `class_labels`."""

from dae_diffusers.data.configuration import EMBEDDED, DataConfig
from dae_diffusers.data.dataset import ImageDataset
from dae_diffusers.data.images import ImageReader, decode_image, is_flipped, resize_and_crop
from dae_diffusers.data.loaders import (
    MicrobatchSampler,
    count_images,
    describe_size,
    make_pass_loader,
    make_stream_loader,
    make_training_loader,
)
from dae_diffusers.data.loading import load_images
from dae_diffusers.data.streaming import ImageStream, StreamedImages

__all__ = [
    "EMBEDDED",
    "DataConfig",
    "ImageDataset",
    "ImageReader",
    "ImageStream",
    "MicrobatchSampler",
    "StreamedImages",
    "count_images",
    "decode_image",
    "describe_size",
    "is_flipped",
    "load_images",
    "make_pass_loader",
    "make_stream_loader",
    "make_training_loader",
    "resize_and_crop",
]
