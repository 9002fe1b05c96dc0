"""Builds an autoencoder that can be trained in stages from the settings."""

import logging
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, ModelMixin, VQModel

from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL
from dae_diffusers.autoencoders.fewer_channels import first_latent_channels
from dae_diffusers.autoencoders.loading import (
    check_can_be_trained,
    is_vq,
    load_autoencoder,
    settle_images,
    spatial_factor,
)
from dae_diffusers.autoencoders.settings import check_decoder_widths
from dae_diffusers.autoencoders.tuned import TUNED
from dae_diffusers.autoencoders.vq_model import DAEVQModel
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.pipelines.dae_dit import autoencoder_shape
from dae_diffusers.settings import changes_of
from dae_diffusers.sizes import height_and_width
from dae_diffusers.store import fingerprint
from dae_diffusers.weights import STATISTICS, weights_of

logger = logging.getLogger(__name__)


def make_autoencoder(config: Any, trained: AutoencoderKL | VQModel | None = None) -> DAEAutoencoderKL | DAEVQModel:
    r"""
    Makes the autoencoder to train: a new one, one that starts from a published autoencoder, or for stage 2 alone the one that a
    stage 1 has saved.

    Args:
        config: Settings with the parts `data`, `autoencoder`, `codebook`, `stages` and `optimization`.
        trained ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`], *optional*): For stage 3: the autoencoder itself.

    Raises:
        UserError: If the model to start from does not exist, is of another kind, or does not fit the images.
    """
    if trained is not None:
        return (DAEVQModel if is_vq(trained) else DAEAutoencoderKL).from_diffusers(trained)
    is_codebook = config.autoencoder.autoencoder == "vq"
    model_class, diffusers_class = (DAEVQModel, VQModel) if is_codebook else (DAEAutoencoderKL, AutoencoderKL)
    if config.autoencoder.pretrained_model_name_or_path is not None:
        return load_published(config, model_class, diffusers_class)
    if config.stages.stage == "2":
        return load_stage1(config, model_class)
    sizes = config.autoencoder
    levels = len(sizes.block_out_channels)
    latents = {"latent_channels": sizes.latent_channels}
    if is_codebook:
        settings = {"type": config.codebook.quantizer, **config.codebook.quantizer_settings()}
        latents = config.codebook.quantizer_size(sizes.latent_channels)
        latents |= {f"quantizer_{name}": value for name, value in settings.items()}
    return model_class(
        in_channels=config.data.image_channels,
        out_channels=config.data.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(sizes.block_out_channels),
        layers_per_block=sizes.layers_per_block,
        **latents,
        norm_num_groups=sizes.norm_num_groups,
        mid_block_add_attention=sizes.mid_block_add_attention,
        sample_size=config.data.resolution,
        **config.stages.auxiliary_settings(),
        **sizes.decoder_sizes(sizes.block_out_channels),
    )


def load_published(config: Any, model_class: type, diffusers_class: type) -> DAEAutoencoderKL | DAEVQModel:
    """Loads the autoencoder `pretrained_model_name_or_path`, with a fresh auxiliary decoder if a stage 1 follows."""
    name = config.autoencoder.pretrained_model_name_or_path
    vae = load_autoencoder(name)
    if type(vae) in TUNED:
        return settled(config, tuned_decoder(config, vae, name), vae)
    check_can_be_trained(vae, name)
    if not isinstance(vae, diffusers_class):
        raise UserError(
            f"`pretrained_model_name_or_path` {name} is of class {type(vae).__name__}, but `autoencoder "
            f"{config.autoencoder.autoencoder}` takes a model of class {diffusers_class.__name__}. Choose the `autoencoder` that fits "
            "it: kl or vq."
        )
    sizes = decoder_sizes_of(config, vae)
    try:
        # Stage 2 has no use for an auxiliary decoder.
        auxiliary = (
            {"auxiliary_decoder_type": "none"} if config.stages.stage == "2" else config.stages.auxiliary_settings()
        )
        model = model_class.from_diffusers(vae, **auxiliary, **sizes)
    except ValueError as error:  # an auxiliary decoder that does not fit this architecture
        raise UserError(str(error)) from None
    return settled(config, model, vae)


def tuned_decoder(config: Any, vae: ModelMixin, name: str) -> ModelMixin:
    """An autoencoder of another class, whose decoder alone can be trained on."""
    kind = type(vae).__name__
    if config.stages.stage != "2":
        raise UserError(f"{name} has a {kind}, of which only the decoder can be trained: give `stage 2`.")
    if config.autoencoder.has_own_decoder:
        raise UserError(
            f"{name} has a {kind}, whose decoder keeps its size: leave out `decoder`, `decoder_block_out_channels` and "
            "`decoder_layers_per_block`."
        )
    if config.optimization.gradient_checkpointing and not vae._supports_gradient_checkpointing:
        raise UserError(f"{name} has a {kind}, which cannot do `gradient_checkpointing`: leave it out.")
    return TUNED[type(vae)].from_diffusers(vae)


def load_stage1(config: Any, model_class: type) -> DAEAutoencoderKL | DAEVQModel:
    """Loads the autoencoder that a stage 1 has saved in `stage1_dir`."""
    path = config.stages.stage1_dir
    try:
        class_name = model_class.load_config(stage1_folder(path)).get("_class_name")
        if class_name != model_class.__name__:
            raise UserError(
                f"{path} holds a {class_name}, but `autoencoder {config.autoencoder.autoencoder}` continues from a "
                f"{model_class.__name__}. Choose the `autoencoder` of its stage 1."
            )
        given = model_class.from_pretrained(stage1_folder(path))
    except OSError as error:
        raise UserError(f"`stage1_dir` {path} holds no stage-1 autoencoder: {one_line(error, 300)}") from None
    model = with_kept_channels(given, config.stages.keep_latent_channels, path)
    sizes = decoder_sizes_of(config, model)
    return settled(config, model.with_decoder(**sizes) if sizes else model, given)


def stage1_folder(output_dir: str) -> str:
    r"""Where a stage 1 has saved its autoencoder: in `stage1/` of its output folder, which may be given itself."""
    inside = Path(output_dir) / "stage1"
    return str(inside) if inside.is_dir() else output_dir


def with_kept_channels(
    model: DAEAutoencoderKL | DAEVQModel, count: int | None, path: str
) -> DAEAutoencoderKL | DAEVQModel:
    """The model that `keep_latent_channels` asks for, of the one in `path`."""
    total, kind = model.config.latent_channels, model.config.auxiliary_decoder_type
    if count is None:
        return model
    if kind != "prefix" or is_vq(model):
        found = "has a codebook" if is_vq(model) else f"was trained with `auxiliary_decoder {kind}`"
        raise UserError(
            f"`keep_latent_channels` needs channels that are ordered by importance, but {path} {found}. Train a stage 1 with "
            "`auxiliary_decoder prefix` and `autoencoder kl`."
        )
    if count > total:
        raise UserError(
            f"`keep_latent_channels` is {count}, but the encoder in {path} has {total} channels. Give at most {total}."
        )
    return first_latent_channels(model, count)


def settled(config: Any, model: ModelMixin, given: ModelMixin) -> ModelMixin:
    """The model, once it and the images agree on their size. The decoder may make other sizes than the one of the given model."""
    _warn_of_sizes(config, given)
    side, factor, before = autoencoder_shape(given.config).side, spatial_factor(model), spatial_factor(given)
    sides = [each * factor // before for each in height_and_width(side)] if side else None
    settle_images(config, model, side=sides)
    model.register_to_config(sample_size=config.data.resolution)
    model.given_weights = fingerprint(weights_of(given))
    model.given_statistics = {name: given.config[name] for name in STATISTICS if name in given.config}
    return model


def _warn_of_sizes(config: Any, given: ModelMixin) -> None:
    """Warns of flags that give the encoder a size, where the given model has another one."""
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in given.config.items()}
    for name, value in changes_of(config.autoencoder).items():
        if name in own and not name.startswith("decoder") and own[name] != value:
            logger.warning("`--%s` has no effect: the given autoencoder has %s.", name, own[name])


def settings_beside_weights(model: ModelMixin) -> dict[str, Any]:
    """The settings, by their flags, that change what the same weights compute: no checkpoint fails to load because of them."""
    settings = {"norm_num_groups": model.config.get("norm_num_groups")}
    if is_vq(model):
        levels = model.config.quantizer_fsq_levels
        settings |= {
            "quantizer": model.config.quantizer_type,
            "fsq_levels": None if levels is None else list(levels),
            "l2_normalize_codes": model.config.quantizer_l2_normalize,
        }
    return settings


def decoder_sizes_of(config: Any, model: ModelMixin) -> dict[str, Any]:
    """The decoder's size for the encoder of a trained model, if it is to have its own."""
    sizes = config.autoencoder.decoder_sizes(model.config.block_out_channels, model.config.norm_num_groups)
    groups = sizes.get("decoder_norm_num_groups") or model.config.norm_num_groups
    try:
        more = int(config.autoencoder.decoder == "x2")
        check_decoder_widths(sizes.get("decoder_block_out_channels"), model.config.block_out_channels, groups, more)
    except ValueError as error:
        raise UserError(str(error)) from None
    return sizes
