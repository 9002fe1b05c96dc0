"""What generators are and how they train. Needs no torch."""

from typing import Literal

from dae_diffusers.data.configuration import DataConfig
from dae_diffusers.errors import ConfigError
from dae_diffusers.guidance import check_interval
from dae_diffusers.settings import field, settings

# Blocks of each named size; a test compares them with the transformer's.
DIT_LAYERS = {"DiT-Ti": 6, "DiT-XS": 8, "DiT-S": 12, "DiT-B": 12, "DiT-L": 24, "DiT-XL": 28}
DEFAULT_MODEL = "DiT-S/2"


@settings
class TransformerConfig:
    """Transformer."""

    vae: str = field(help="folder or Hub id of the autoencoder")
    latent_cache: str | None = field(None, "folder written by cache_latents.py, to read latents instead of images")
    pretrained_model_name_or_path: str | None = field(
        None, "start from the weights of this pipeline or transformer (Hub id or folder); classes and size may differ"
    )
    model: str | None = field(
        None,
        "size (DiT-Ti, -XS, -S, -B, -L or -XL) and patch size (/1, /2, /4); default: DiT-S/2, or that of pretrained weights",
    )
    patch_size: int | None = field(None, "patch size; default: that of `--model`", at_least=1, advanced=True)
    num_layers: int | None = field(None, "transformer blocks; default: those of `--model`", at_least=1, advanced=True)
    num_attention_heads: int | None = field(
        None, "attention heads of each block; default: those of `--model`", at_least=1, advanced=True
    )
    attention_head_dim: int | None = field(
        None, "width of a head; default: that of `--model`", at_least=1, advanced=True
    )
    text_encoder: str | None = field(None, "generate from captions: a text encoder of transformers (Hub id or folder)")
    text_encoder_dtype: Literal["float32", "float16", "bfloat16"] = field(
        "float32", "data type of the text encoder and of its hidden states", needs="text_encoder", advanced=True
    )
    class_dropout_prob: float = field(
        0.1,
        "share of samples without label, caption and conditions, for guidance; with captions and others, the same share without "
        "one of them",
        at_least=0,
        below=1,
        hint="for a model without classes, use `label_column none`",
    )
    max_train_steps: int = field(10000, "optimiser steps", at_least=1)

    def __post_init__(self):
        size, _, patch = self.size.partition("/")
        if size not in DIT_LAYERS or not patch.isdecimal() or int(patch) == 0:
            raise ConfigError(
                f"`model` is {self.model!r}, but must be one of {', '.join(DIT_LAYERS)}, a slash and a patch size, such as `DiT-S/2`."
            )
        if self.attention_head_dim is not None and self.attention_head_dim % 4:
            raise ConfigError(
                f"`attention_head_dim` is {self.attention_head_dim}, but must be a multiple of 4 (rotary positions)."
            )

    def check_captions(self, data: DataConfig) -> None:
        """Raises `ConfigError` unless captions and what encodes them are both given, with images that have them, or neither."""
        given = {"caption_column": data.caption_column, "text_encoder": self.text_encoder}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == 1:
            (other,) = given.keys() - missing
            raise ConfigError(
                f"`{other}` needs `{missing[0]}`: a transformer generates from captions that a text encoder has encoded. Give both "
                "or neither."
            )
        if not missing:
            data.require_images("`caption_column`")

    @property
    def size(self) -> str:
        """The named size of a new transformer."""
        return DEFAULT_MODEL if self.model is None else self.model

    @property
    def depth(self) -> int | None:
        """Number of blocks; None if it is that of pretrained weights."""
        is_given = self.pretrained_model_name_or_path is not None and self.model is None
        return self.num_layers or (None if is_given else DIT_LAYERS[self.size.partition("/")[0]])

    def instead_of_named(self) -> dict[str, int]:
        """The arguments of the transformer's constructor that replace those of the named size."""
        names = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@settings
class FlowMatchingConfig:
    """Flow matching and samples."""

    timestep_sampling: Literal["logit_normal", "uniform"] = field(
        "logit_normal", "distribution of the noise levels in training", advanced=True
    )
    timestep_shift: float | None = field(
        None,
        "above 1: more noise, in training and in sampling; for latents that hold more numbers than the images; default: 1, or that "
        "of pretrained weights",
        above=0,
        advanced=True,
    )
    num_sample_images: int = field(40, "images of the sample grid at each validation", at_least=1, advanced=True)
    validation_prompts: list[str] = field(
        [],
        "texts that the grid shows, a row for each; default: captions of held-out images",
        needs="text_encoder",
        advanced=True,
        free_text=True,
    )
    sample_steps: int | None = field(
        None,
        "denoising steps of the grid, and later of the pipeline by default; default: 25, or 4 after distillation",
        at_least=1,
        advanced=True,
    )
    sample_guidance_scale: float = field(
        2.0,
        "guidance scale of the grid, and later of the pipeline by default; 1 turns it off; unused with `--class_dropout_prob 0`",
        needs="class_dropout_prob or autoguidance_steps",
        advanced=True,
    )
    sample_guidance_interval: list[float] | None = field(
        None,
        "the two noise levels between which guidance acts, from 0 (clean) to 1 (noise), in the grid, and later in the pipeline by "
        "default; not with `--autoguidance_steps`, nor for diffusion; with `--distill_guidance_scale`: in the transformer that is "
        "distilled; default: 0 0.6, for distillation that of the given pipeline",
        at_least=0,
        at_most=1,
        needs="class_dropout_prob or distill_guidance_scale",
        advanced=True,
    )
    autoguidance_steps: int | None = field(
        None,
        "keep the weights after N steps, about a third of all, in the pipeline: guidance leads away from these weaker ones, also "
        "without classes and texts",
        at_least=1,
    )
    distill_guidance_scale: float | None = field(
        None,
        "distill the pretrained transformer into one that samples in 2 to 8 steps, with this guidance scale in it; 1 turns guidance off",
        at_least=1,
        advanced=True,
    )

    def __post_init__(self):
        check_interval("sample_guidance_interval", self.sample_guidance_interval)
        if self.sample_guidance_interval is not None and self.autoguidance_steps is not None:
            raise ConfigError(
                "`sample_guidance_interval` does not go with `autoguidance_steps`, which guides at all noise levels. Leave one out."
            )

    @property
    def num_sample_steps(self) -> int:
        """Denoising steps of a drawn image."""
        return self.sample_steps or (25 if self.distill_guidance_scale is None else 4)


@settings
class RepresentationAlignmentConfig:
    """Representation alignment (REPA)."""

    repa_model: str | None = field(
        None, "align hidden states with the features of this vision model (Hub id or folder); needs the images"
    )
    repa_weight: float = field(
        0.5,
        "weight of the alignment",
        above=0,
        hint="leave out `repa_model` instead",
        needs="repa_model",
        advanced=True,
    )
    repa_layer: int | None = field(
        None,
        "number of the block whose output is aligned; default: a third of the depth",
        needs="repa_model",
        advanced=True,
    )
    repa_projector_dim: int = field(
        2048, "width of the projector, which is not exported", at_least=1, needs="repa_model", advanced=True
    )


@settings
class PriorConfig:
    """Prior."""

    vae: str = field(help="folder or Hub id of an autoencoder with a codebook")
    code_cache: str | None = field(
        None, "folder for the codes, which several priors may share; default: `<output_dir>/codes`", advanced=True
    )
    num_layers: int = field(8, "transformer blocks", at_least=1)
    num_attention_heads: int = field(4, "attention heads of each block", at_least=1)
    attention_head_dim: int = field(64, "width of a head; the model is as wide as its heads together", at_least=2)
    attention_dropout: float = field(0.0, "dropout of the attention weights", at_least=0, below=1, advanced=True)
    class_dropout_prob: float = field(
        0.1,
        "share of samples whose label is dropped, for guidance",
        at_least=0,
        below=1,
        hint="for a model without classes, use `label_column none`",
    )
    max_train_steps: int = field(10000, "optimiser steps", at_least=1)

    def __post_init__(self):
        if self.attention_head_dim % 2:
            raise ConfigError(
                f"`attention_head_dim` is {self.attention_head_dim}, but must be even (rotary positions)."
            )


@settings
class PriorSamplesConfig:
    """Samples."""

    num_sample_images: int = field(40, "images of the sample grid at each validation", at_least=1, advanced=True)
    sample_guidance_scale: float = field(
        2.0,
        "guidance scale of the grid; 1 turns it off; unused with `--class_dropout_prob 0`",
        needs="class_dropout_prob",
        advanced=True,
    )
    sample_temperature: float = field(1.0, "temperature of the grid", above=0, advanced=True)
    sample_top_k: int | None = field(
        None, "sample the grid only from the N most likely codes", at_least=1, advanced=True
    )
    sample_top_p: float | None = field(
        None,
        "sample the grid only from the most likely codes that have this probability together",
        above=0,
        at_most=1,
        advanced=True,
    )


def check_conditions(data: DataConfig) -> None:
    """Raises `ConfigError` if the columns that images are drawn from are not at hand."""
    for name, value in data.condition_columns().items():
        if value:
            data.require_images(f"`{name}`")
