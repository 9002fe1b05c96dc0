"""
Image to image with a diffusion transformer in the latent space of an autoencoder.

Needs torch and diffusers only, and the file of `DAEDiTPipeline`, which lies beside it in a model's folder as `pipeline.py`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput

from dae_diffusers.pipelines.dae_dit import (
    DAEDiTPipeline,
    as_list,
    autoencoder_shape,
    is_number,
    is_representation_autoencoder,
    pixels_of,
    resized,
)


class DAEDiTImg2ImgPipeline(DAEDiTPipeline):
    r"""
    Draws images that begin with given ones: their latents get noise up to a level, from which the transformer goes on.

    It has the components of [`DAEDiTPipeline`]: `DAEDiTImg2ImgPipeline.from_pipe(pipe)`, or `from_pretrained` of the same folder. With
    diffusers alone: `DiffusionPipeline.from_pretrained(folder, custom_pipeline="dae_dit_img2img", trust_remote_code=True)`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | Iterable[int | str] | None = None,
        image: Any = None,
        strength: float = 0.6,
        *,
        class_labels: int | str | Iterable[int | str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_label: int = 1,
        num_images_per_prompt: int | None = None,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images from images.

        Args:
            prompt, class_labels (*optional*): As in [`DAEDiTPipeline`]; one for all images, or one per image.
            image (PIL image, array, tensor, or a list of them):
                One for all labels or prompts, or one per label or prompt. Like the pipeline's output: pictures, arrays `(H, W, C)`
                or `(B, H, W, C)`, tensors `(C, H, W)` or `(B, C, H, W)`, with numbers in [0, 1], or 0 to 255 if they are `uint8`.
                If the pipeline has a `value_range`, arrays are in that range. Pictures get the autoencoder's colours, and white behind
                transparency.
            strength (`float`, defaults to 0.6):
                How much may change, in [0, 1]: the share of the scheduler's steps that are done, rounded. 0 gives the autoencoder's
                reconstruction, 1 what [`DAEDiTPipeline`] draws without an image. Between them at least one step is done.
            height, width (`int`, *optional*):
                Size of the result in pixels; by default what the transformer was trained on. Images of another size are
                resized to it, whatever their aspect ratio: crop them before.
            num_images_per_label, num_images_per_prompt (`int`, defaults to 1):
                Images per label or prompt, or per image, next to each other in the result.
            kwargs: All others of [`DAEDiTPipeline`]: `guidance_scale`, `num_inference_steps`, `generator`, `output_type`,
                `callback_on_step_end`... `latents` is the noise that the images get. An image that the
                same noise has drawn gets too strong colours: take another seed.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `images`, as in [`DAEDiTPipeline`].

        Raises:
            `ValueError`: If an argument does not fit the models or the other arguments.

        Example:
            ```py
            pipe = DAEDiTImg2ImgPipeline.from_pretrained("user/my-model").to("cuda")
            image = pipe("cat", image=load_image("dog.png"), strength=0.5).images[0]
            ```
        """
        if not is_number(strength) or not 0 <= strength <= 1:
            raise ValueError(
                f"`strength` is {strength!r}, but must lie between 0 (reconstruction) and 1 (the image is ignored)."
            )
        prompt, class_labels = (list(each) if isinstance(each, Iterator) else each for each in (prompt, class_labels))
        height, width = self._image_size(height, width, kwargs.get("latents"))
        pixels = self.prepare_images(image, height, width)
        count = num_images_per_label if num_images_per_prompt is None else num_images_per_prompt
        texts = {"prompt": prompt, **kwargs}
        count *= self._images_of_each(len(pixels), class_labels, texts)
        self._strength, self._image_latents = strength, self.encode_pixels(pixels)
        return super().__call__(
            prompt, class_labels=class_labels, height=height, width=width, num_images_per_label=count, **kwargs
        )

    def prepare_images(self, image: Any, height: int, width: int) -> torch.Tensor:
        """
        Images as the autoencoder takes them, but in [0, 1].

        Args:
            image: As in a call.
            height, width (`int`): Size in pixels; images of another are resized.

        Returns:
            `torch.Tensor` of shape `(B, channels, height, width)`: float32, on the pipeline's device.

        Raises:
            `ValueError`: If there is no image, or one has other channels or numbers.
        """
        channels = autoencoder_shape(self.vae.config).image_channels
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
        pixels = [pixels_of(each, "image", mode, self.value_range) for each in as_list(image, "image")]
        for each in pixels:
            if each.shape[1] != channels:
                raise ValueError(
                    f"`image` has {each.shape[1]} channels, but the autoencoder takes {channels}. Arrays have the shape (H, W, C), "
                    "tensors (C, H, W)."
                )
        return torch.cat([resized(each, height, width) for each in pixels]).to(self._execution_device)

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Encodes images into normalised latents, of which `decode_latents` makes their reconstruction.

        Args:
            pixels (`torch.Tensor` of shape `(B, channels, H, W)`): Images in [0, 1], see `prepare_images`.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: float32.
        """
        pixels = pixels if is_representation_autoencoder(self.vae.config) else 2 * pixels - 1

        def encode(dtype: torch.dtype) -> torch.Tensor:
            encoded = self.vae.encode(pixels.to(dtype))
            return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]

        raw = self._in_enough_range(encode).float()
        shift, scaled = (self.raw_latents(torch.full_like(raw[:1], value)) for value in (0.0, 1.0))
        return (raw - shift) / (scaled - shift)  # `raw_latents` undone

    def _image_size(self, height: int | None, width: int | None, latents: torch.Tensor | None) -> tuple[int, int]:
        _, *sides = self._latent_shape(height, width, latents)
        return tuple(side * self.vae_scale_factor for side in sides)

    def _images_of_each(self, num_images: int, class_labels: Any, texts: Mapping[str, Any]) -> int:
        """How many of the given images belong to each label or prompt: all to the only one, or one."""
        _, labels = self._told_apart(texts["prompt"], class_labels)
        labels, conditions = self._by_column(labels, texts.get("conditions"))
        names = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds") if self.takes_text else ()
        several = [texts[name] for name in names if isinstance(texts.get(name), list | tuple | torch.Tensor)]
        several += self.encode_conditions(conditions).values()
        count = max(len(each) for each in (self._resolve_labels(labels), *several))
        if count > 1 and num_images not in (1, count):
            raise ValueError(
                f"`image` holds {num_images} images, but there are {count} labels or prompts or conditions. Pass one of either, or "
                "as many of both."
            )
        return num_images if count == 1 else 1

    def _begin(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, timesteps = super()._begin(noise)
        order = getattr(self.scheduler, "order", 1)  # calls of the scheduler for each step, but for the last
        steps = math.ceil(len(timesteps) / order)
        left = 0 if self._strength == 0 else max(1, round(steps * self._strength))
        self._first = min((steps - left) * order, len(timesteps))
        self._noise, repeats = noise, len(noise) // len(self._image_latents)
        self._image_latents = self._image_latents.repeat_interleave(repeats, dim=0)
        if self._strength == 1:  # the first noise level of some schedulers still shows the image
            return latents, timesteps
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self._first)
        return self._noised_images(0), timesteps[self._first :]

    def _noised_images(self, step: int) -> torch.Tensor:
        """The given images with the noise that the scheduler expects before a step of this call, or with none after the last."""
        timesteps, index = self.scheduler.timesteps, self._first + step
        if index >= len(timesteps):
            return self._image_latents
        if self.is_flow_matching:
            return torch.lerp(self._image_latents, self._noise, float(self.scheduler.sigmas[index]))
        if type(self.scheduler).__name__ == "KDPM2DiscreteScheduler" and not self.scheduler.state_in_first_order:
            # Its second call in a step is at a noise level between two steps, which `add_noise` does not know.
            return self._image_latents + self._noise * self.scheduler.sigmas_interpol[self.scheduler.step_index]
        return self.scheduler.add_noise(
            self._image_latents, self._noise, timesteps[index : index + 1].expand(len(self._noise))
        )


del DAEDiTPipeline  # diffusers takes for the pipeline of a file the only one that it finds there
