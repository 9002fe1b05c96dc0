"""Measures how close a reconstruction is to its image."""

import importlib.util
import logging
from collections.abc import Callable

import torch

from dae_diffusers.errors import one_line
from dae_diffusers.vision import LPIPSNet, as_rgb, load_lpips_network

logger = logging.getLogger(__name__)

# From `reconstruction` and `pixel_values`, both (B, C, H, W) in [-1, 1], to a number for each image, (B,).
ImageMeasure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# SSIM's window: a Gaussian of standard deviation 1.5 cut to 11 pixels, 5 on each side of its centre.
_SSIM_SIGMA = 1.5
_SSIM_REACH = 5


def peak_signal_to_noise_ratio(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    r"""
    PSNR of each image, `10 log10(4 / mse)`: the range [-1, 1] has a peak of 2.

    Args:
        reconstruction, pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1]; the reconstruction is
            clamped to it, as saving the image would.

    Returns:
        `torch.Tensor` of shape `(B,)`: In dB, float32; infinite for equal images.
    """
    mse = (reconstruction.float().clamp(-1, 1) - pixel_values.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)


def structural_similarity(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    r"""
    SSIM of each image, from `torchmetrics`: the mean over pixels and channels, with an 11x11 Gaussian window of
    standard deviation 1.5, `K1 = 0.01` and `K2 = 0.03`.

    Images are shifted to [0, 2] first (a range of 2), because SSIM compares means, which must not be negative. The result
    is the same as for these images in [0, 1] or [0, 255].

    The window never shrinks. At the border it sees the mirrored image, and border pixels count like any others, unlike
    in scikit-image. In an image smaller than the window, all pixels are border pixels. Then the number is defined, but
    tells little about structure, and can be compared only at the same size.

    Args:
        reconstruction, pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1]; the reconstruction is
            clamped to it, as saving the image would. At least 6 pixels high and wide.

    Returns:
        `torch.Tensor` of shape `(B,)`: In [-1, 1], float32; 1 for equal images.

    Raises:
        ImportError: Without the package `torchmetrics`.
        ValueError: For smaller images: they cannot be mirrored far enough.

    Source: Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise ImportError("SSIM needs the package torchmetrics: `pip install torchmetrics`.") from None
    if min(pixel_values.shape[2:]) <= _SSIM_REACH:
        raise ValueError(
            f"images have {pixel_values.shape[2]}x{pixel_values.shape[3]} pixels, but SSIM needs at least "
            f"{_SSIM_REACH + 1}x{_SSIM_REACH + 1}. Report PSNR alone, or use a higher resolution."
        )
    return structural_similarity_index_measure(
        reconstruction.float().clamp(-1, 1) + 1,
        pixel_values.float() + 1,
        sigma=_SSIM_SIGMA,
        data_range=2.0,
        k1=0.01,
        k2=0.03,
        reduction="none",
    )


def image_measures(
    image_shape: tuple[int, int, int], *, lpips_net: LPIPSNet | None = None, device: torch.device | str = "cpu"
) -> dict[str, ImageMeasure]:
    r"""
    All measures that this machine has for images of a kind. The log names measures that are left out, with the reason.

    Args:
        image_shape (`tuple[int, int, int]`): Channels, height and width.
        lpips_net (`str`, *optional*): Network of the LPIPS; None for no LPIPS.
        device (`torch.device`, *optional*): Where the LPIPS computes.

    Returns:
        `dict[str, ImageMeasure]`: `psnr` always; `ssim` with `torchmetrics`, for images of at least 6x6 pixels;
        `lpips_<net>` with `lpips` and its weights, for pictures (gray, RGB, RGBA on white) that are large enough for the network.
    """
    measures: dict[str, ImageMeasure] = {"psnr": peak_signal_to_noise_ratio}
    nothing = torch.zeros(1, *image_shape)
    try:
        structural_similarity(nothing, nothing)
        measures["ssim"] = structural_similarity
    except (ImportError, ValueError) as error:
        logger.info("SSIM is left out: %s", error)
    if lpips_net is None or importlib.util.find_spec("lpips") is None:
        return measures
    try:
        lpips = load_lpips(lpips_net, device)
        lpips(nothing, nothing)
        measures[f"lpips_{lpips_net}"] = lpips
    # packages, weights, images that are too small, channels
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        logger.info("LPIPS is left out: %s", one_line(error, 300))
    return measures


def load_lpips(net: LPIPSNet = "alex", device: torch.device | str = "cpu") -> ImageMeasure:
    r"""
    Loads the LPIPS metric of the package `lpips`, version 0.1 of its weights.

    Args:
        net (`str`, *optional*, defaults to `"alex"`): The network; `alex` is the usual metric, `vgg` the usual loss.
            Numbers of different networks are not comparable.
        device (`torch.device`, *optional*): Where it computes.

    Returns:
        `Callable`: From `reconstruction` (clamped) and `pixel_values`, both `(B, C, H, W)` in [-1, 1] with 1
        (repeated) or 3 channels, to the distance of each image, `(B,)`, float32, >= 0.

    Raises:
        ImportError: Without the package `lpips`, which needs `torchvision` too.
        OSError: If the weights of the network are not on the disk and cannot be fetched.

    Source: Zhang et al., 2018, https://huggingface.co/papers/1801.03924.
    """
    model = load_lpips_network(net).to(device)

    @torch.no_grad()
    def distance(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        images = (reconstruction.clamp(-1, 1), pixel_values)
        return model(*(as_rgb(image.to(device).float()) for image in images)).flatten()

    return distance
