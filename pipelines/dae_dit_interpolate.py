"""
A series of images between two, with a diffusion transformer in the latent space of an autoencoder.

Needs torch and diffusers only, and the file of `DAEDiTPipeline`, which lies beside it in a model's folder as `pipeline.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor

from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline, columns_of, whole_number


class DAEDiTInterpolationPipeline(DAEDiTPipeline):
    r"""
    Draws a series of images that goes from one seed to another, from one class or text to another, or both.

    Between seeds the noise turns along the great circle ([`slerp`]). Between classes, texts or conditions the transformer's
    predictions for both are mixed. The first and the last image are those that [`DAEDiTPipeline`] draws.

    It has the components of [`DAEDiTPipeline`]: `DAEDiTInterpolationPipeline.from_pipe(pipe)`, or `from_pretrained` of the same
    folder. With diffusers alone:
    `DiffusionPipeline.from_pretrained(folder, custom_pipeline="dae_dit_interpolate", trust_remote_code=True)`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | Iterable[int | str] | None = None,
        *,
        class_labels: int | str | Iterable[int | str] | Mapping[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
        num_images: int = 8,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates a series of images.

        Args:
            prompt, class_labels, conditions (*optional*):
                The text, class or condition of all images, or (as a list) those of the first and the last; see [`DAEDiTPipeline`].
            num_images (`int`, defaults to 8): Images of the series, both ends included; at least 2.
            generator (`torch.Generator` or two of them, *optional*):
                Source of the noise of all images, or of the first and of the last. Noise that a scheduler adds in its steps is
                for all but the last image that of the first.
            latents (`torch.Tensor` of shape `(1, C, h, w)` or `(2, C, h, w)`, *optional*): That noise, instead of drawing it.
            height, width, kwargs: As in [`DAEDiTPipeline`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `images`, from the first to the last.

        Raises:
            `ValueError`: If an argument does not fit the models or the other arguments.

        Example:
            ```py
            pipe = DAEDiTInterpolationPipeline.from_pretrained("user/my-model").to("cuda")
            seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
            images = pipe(("cat", "dog"), generator=seeds, num_images=9).images
            ```
        """
        if (whole_number(num_images) or 0) < 2:
            raise ValueError(f"`num_images` is {num_images!r}, but a series has at least 2.")
        for name in ("num_images_per_label", "num_images_per_prompt"):
            if kwargs.pop(name, None) not in (None, 1):
                raise ValueError(
                    f"`{name}` was given, but each call draws one series. Say by `num_images` how long it is."
                )
        prompt, class_labels = self._told_apart(prompt, class_labels)
        class_labels, conditions = self._by_column(class_labels, conditions)
        label_ids = self._resolve_labels(class_labels)
        images = columns_of(self.conditions, "channels")
        least = {name: 4 if name in images else 1 for name in conditions}  # dimensions of a batch
        ends = {
            name: list(value)
            if isinstance(value, list | tuple) or getattr(value, "ndim", 0) >= least[name]
            else [value]
            for name, value in conditions.items()
        }
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            count = 1 if kwargs.get(name) is None else len(kwargs[name])
            if count != 1:
                raise ValueError(
                    f"`{name}` holds {count} texts, but here embeddings are for all images: give one, or two texts as `prompt`."
                )
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        generators = list(generator) if isinstance(generator, list | tuple) else [generator]
        self._check_generators(None if generator is None else generators, len(generators))
        given = {"prompt": prompts, "class_labels": label_ids, "generator": generators}
        given |= ends | ({} if latents is None else {"latents": latents})
        for name, values in given.items():
            if len(values) not in (1, 2):
                raise ValueError(
                    f"`{name}` holds {len(values)}, but a series has one for all images, or two for its ends."
                )
        device = self._execution_device
        shape = self._latent_shape(height, width, latents)
        if latents is None:
            latents = torch.cat([randn_tensor((1, *shape), each, device, torch.float32) for each in generators])
        self._shares = torch.linspace(0, 1, num_images, device=device)
        self._last = {} if len(set(label_ids)) == 1 else {"class_labels": torch.tensor(label_ids[1:], device=device)}
        if len(set(prompts)) == 2:
            names = ("encoder_hidden_states", "encoder_attention_mask")
            self._last |= dict(zip(names, self.encode_prompt(prompts[1], device=device), strict=False))
        if any(len(values) == 2 for values in ends.values()):
            last = {name: values[-1] for name, values in ends.items()}
            height, width = (side * self.vae_scale_factor for side in shape[1:])
            self._last |= self.encode_conditions(last, height=height, width=width)
        self._is_conditional = any(values[-1] is not None for values in (prompts, *ends.values()))
        return super().__call__(
            prompts[0],
            class_labels=None if class_labels is None else label_ids[:1],
            conditions={name: values[0] for name, values in ends.items()},
            num_images_per_label=num_images,
            generator=None if generator is None else [*_copies(generators[0], num_images - 1), generators[-1]],
            latents=slerp(*latents.to(device, torch.float32)[[0, -1]], self._shares),
            height=height,
            width=width,
            **kwargs,
        )

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        arguments: dict[str, torch.Tensor],
        transformer: ModelMixin | None = None,
    ) -> torch.Tensor:
        prediction = super()._predict(latents, timestep, arguments, transformer)
        if not self._last:
            return prediction
        count = len(self._shares)  # what follows is the prediction without a class or text
        ends = {name: value.expand(count, *value.shape[1:]) for name, value in self._last.items()}
        arguments = {name: value[:count] for name, value in arguments.items()} | ends
        last = super()._predict(latents[:count], timestep, arguments, transformer)
        return torch.cat((torch.lerp(prediction[:count], last, self._shares.view(-1, 1, 1, 1)), prediction[count:]))


def slerp(first: torch.Tensor, last: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """
    Turns one noise into another at an even speed. In between it is normal noise too, which a straight line would make too small.

    Args:
        first, last (`torch.Tensor` of one shape `(C, h, w)`): The ends.
        shares (`torch.Tensor` of shape `(N,)`): How far to go, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(N, C, h, w)`: `first` at 0, `last` at 1. The norm goes evenly from the one's to the other's.
    """
    shares = shares.view(-1, *(1,) * first.ndim)
    norms = torch.stack((first.norm(), last.norm())).clamp(min=1e-12)
    angle = ((first * last).sum() / norms.prod()).clamp(-1, 1).acos().clamp(min=1e-6)
    turned = ((1 - shares) * angle).sin() * first / norms[0] + (shares * angle).sin() * last / norms[1]
    between = turned / angle.sin() * torch.lerp(norms[0], norms[1], shares)
    return torch.where(shares == 0, first, torch.where(shares == 1, last, between))


def _copies(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Generators that go on as this one would."""
    copies = [torch.Generator(generator.device) for _ in range(count)]
    for copy in copies:
        copy.set_state(generator.get_state())
    return copies


del DAEDiTPipeline  # diffusers takes for the pipeline of a file the only one that it finds there
