"""Images from a Hub dataset, a folder, a stream or the embedded digits to `pixel_values` in [-1, 1] and `class_labels`."""

import importlib

# Names are resolved on first use, so that the settings can be read without torch.
_MODULES = {
    "configuration": ("EMBEDDED", "DataConfig"),
    "dataset": ("ImageDataset",),
    "images": ("ImageReader", "decode_image", "is_flipped", "resize_and_crop", "split_items"),
    "loaders": (
        "BalancedSampler",
        "MicrobatchSampler",
        "count_images",
        "describe_size",
        "held_out_settings",
        "make_pass_loader",
        "make_stream_loader",
        "make_training_loader",
    ),
    "loading": ("load_images",),
    "streaming": ("ImageStream", "StreamedImages"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
