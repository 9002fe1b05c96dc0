"""
Inpainting with a diffusion transformer in the latent space of an autoencoder: a part of an image is regenerated.

Needs torch and diffusers only, and the files of `DAEDiTPipeline` and `DAEDiTImg2ImgPipeline`, which lie beside it in a model's folder.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput

# diffusers copies only what a file imports itself
from dae_diffusers.pipelines.dae_dit import tensor_inputs_of, whole_number
from dae_diffusers.pipelines.dae_dit_img2img import DAEDiTImg2ImgPipeline, as_list, pixels_of


class DAEDiTInpaintPipeline(DAEDiTImg2ImgPipeline):
    r"""
    Draws the part of an image that a mask shows. The rest stays.

    After each step, the latents outside of the mask are those of the image again, with the noise of that step, so that the new part
    is drawn to fit them. At the end every pixel outside of the mask is the given one. Inside, the decoder's mean error along the
    edge is taken back, so that no seam shows.

    It has the components of [`DAEDiTPipeline`]: `DAEDiTInpaintPipeline.from_pipe(pipe)`, or `from_pretrained` of the same folder. With
    diffusers alone: `DiffusionPipeline.from_pretrained(folder, custom_pipeline="dae_dit_inpaint", trust_remote_code=True)`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | Iterable[int | str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
        *,
        blend_width: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "np", "numpy", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Regenerates parts of images.

        Args:
            prompt (*optional*): As in [`DAEDiTImg2ImgPipeline`], as are `class_labels` and all other arguments.
            image (PIL image, array, tensor, or a list of them): As in [`DAEDiTImg2ImgPipeline`].
            mask_image (PIL image, array, tensor, or a list of them):
                Gray, one for all images or one per image: what is 0.5 or brighter is regenerated. Arrays `(H, W)` or `(B, H, W, 1)`,
                tensors `(H, W)` or `(B, 1, H, W)`, in [0, 1], `uint8` (0 to 255, or 0 and 1) or `bool`. It is resized like the image.
                What is transparent stays.
            strength (`float`, defaults to 1.0): How much may change inside of the mask, as in [`DAEDiTImg2ImgPipeline`].
            blend_width (`int`, *optional*):
                Pixels inside of the mask over which its edge is blended; by default the autoencoder's factor. 0 leaves a hard edge.
            height, width, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs, kwargs:
                As in [`DAEDiTImg2ImgPipeline`]. The callback sees the latents after those outside of the mask are set.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `images`, as in [`DAEDiTPipeline`].

        Raises:
            `ValueError`: If the mask is not gray, or an argument does not fit the models or the other arguments.

        Example:
            ```py
            pipe = DAEDiTInpaintPipeline.from_pretrained("user/my-model").to("cuda")
            image = pipe("cat", image=load_image("dog.png"), mask_image=load_image("head.png")).images[0]
            ```
        """
        blend_width = self.vae_scale_factor if blend_width is None else blend_width
        if (whole := whole_number(blend_width)) is None or whole < 0:
            raise ValueError(
                f"`blend_width` is {blend_width!r}, but must be 0 (a hard edge) or a whole number of pixels."
            )
        self._check_output(output_type)
        height, width = self._image_size(height, width, kwargs.get("latents"))
        pixels, mask = self.prepare_images(image, height, width), self.prepare_masks(mask_image, height, width)
        count = max(len(pixels), len(mask))
        if {len(pixels), len(mask)} - {1, count}:
            raise ValueError(
                f"`mask_image` holds {len(mask)} masks for {len(pixels)} images. Pass one, or one per image."
            )
        pixels, self._mask = pixels.expand(count, -1, -1, -1), F.max_pool2d(mask, self.vae_scale_factor)

        wanted = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)

        def keep(pipe, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            tensors["latents"] = self._outside_kept(tensors["latents"], step)
            changed = None
            if callback_on_step_end is not None:
                given = {name: tensors[name] for name in wanted}
                changed = callback_on_step_end(pipe, step, timestep, given)
            return {**tensors, **(changed or {})}

        (latents,) = super().__call__(
            prompt,
            pixels,
            strength,
            height=height,
            width=width,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs={"latents", *wanted},
            **kwargs,
        )
        if output_type != "latent":
            decoded = self.decode_latents(latents).float().clamp(-1, 1)
            pixels, mask = (_for_each(each, decoded) for each in (pixels, mask))
            latents = self._to_output(blended(2 * pixels - 1, decoded, mask, blend_width), output_type)
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=latents) if return_dict else (latents,)

    def prepare_masks(self, mask_image: Any, height: int, width: int) -> torch.Tensor:
        """
        Masks of ones where to draw and zeros elsewhere, `(B, 1, height, width)`, on the pipeline's device.

        Args:
            mask_image: As in a call.
            height, width (`int`): Size in pixels; masks of another are resized.

        Raises:
            `ValueError`: If there is no mask, or one is not gray.
        """
        masks = [pixels_of(_of_ones(each), "mask_image", background=0) for each in as_list(mask_image, "mask_image")]
        for each in masks:
            if each.shape[1] not in (1, 3) or not torch.equal(each, each[:, :1].expand_as(each)):
                raise ValueError(
                    "`mask_image` is not gray, but must be: white is regenerated, black stays. Convert it with `mask.convert('L')`."
                )
        mask = torch.cat([F.interpolate(each[:, :1], (height, width), mode="area") for each in masks])
        return (mask >= 0.5).float().to(self._execution_device)

    def _outside_kept(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Latents after a step, with those of the given images outside of the mask."""
        return torch.where(_for_each(self._mask, latents) > 0, latents, self._noised_images(step + 1))


def _of_ones(mask: Any) -> Any:
    """A mask whose bytes are 0 and 1 as bools or in black and white; any other as it is."""
    if getattr(mask, "mode", None) == "L":  # a picture
        return mask.point(lambda level: 255 * level) if mask.getextrema()[1] == 1 else mask
    is_bytes = str(getattr(mask, "dtype", "")).endswith("uint8")
    return mask > 0 if is_bytes and mask.max() == 1 else mask


def blended(images: torch.Tensor, decoded: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """
    Images outside of a mask, decoded ones inside.

    A decoder also gets wrong what is outside. Inside, the mean of that error nearby is taken back, less and less over `width` pixels
    from the edge.

    Args:
        images, decoded (`torch.Tensor` of shape `(B, C, H, W)`): In any one range.
        mask (`torch.Tensor` of shape `(B, 1, H, W)`): 1 inside, 0 outside.
        width (`int`): In pixels; 0 takes nothing back.

    Returns:
        `torch.Tensor` of the same shape as `images`: Equal to `images` where the mask is 0.
    """

    def around(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(F.pad(values, [width] * 4, mode="replicate"), 2 * width + 1, stride=1)

    outside = 1 - mask
    share = around(outside)  # of the neighbours that are outside: about a half at a straight edge
    error = around(outside * (images - decoded)) / share.clamp(min=1e-6)
    return torch.where(mask > 0, decoded + (2 * share).clamp(max=1) * error, images)


def _for_each(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Values of given images, repeated for the images that were drawn from each."""
    return values.repeat_interleave(len(images) // len(values), dim=0)


del DAEDiTImg2ImgPipeline  # diffusers takes for the pipeline of a file the only one that it finds there
