"""
The diffusion transformer, in this one file: the file is uploaded to the Hub with the model, and loaded from there with torch
and diffusers alone. So it imports nothing else, and `ModelMixin` must stay a name in it (diffusers looks for that name in
the module of a component that is not its own).
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

# Name -> layers, width, heads. S to XL as in Peebles and Xie, 2022; Ti and XS are for CPUs and small data.
DIT_SIZES = {
    "DiT-Ti": (6, 192, 3),
    "DiT-XS": (8, 256, 4),
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}

ABSOLUTE_BASE = 10_000.0
ROTARY_BASE = 100.0  # a grid has tens of rows: a base of 10000 would leave most pairs unrotated (RoPE-ViT, 2403.13298)
NUMBER_OCTAVES = range(-1, 5)  # frequencies 1/2 to 16, of normalised numbers, which lie mostly in [-2, 2]
_FEW_TOKENS = 512  # up to which plain products train faster than the fused kernel, in bfloat16 on a CPU


def _position_tables(
    height: int, width: int, dim: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Positions of a grid of `height * width` tokens, row by row, in float32: the absolute embedding `(N, dim)`, and
    cosine and sine of the rotation `(N, 1, head_dim / 2, 2)`. Token `(row, column)` has the same values in every grid.
    """
    rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)

    def angles(num_frequencies: int, base: float) -> torch.Tensor:
        frequencies = base ** -(torch.arange(num_frequencies, device=device, dtype=torch.float32) / num_frequencies)
        # A broadcast product: autocast would run `torch.outer` in half precision.
        return torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), dim=-1)

    absolute = angles(dim // 4, ABSOLUTE_BASE)  # (N, dim / 2)
    rotary = angles(head_dim // 4, ROTARY_BASE)[:, None]  # (N, 1, head_dim / 2)
    return torch.cat((absolute.sin(), absolute.cos()), dim=-1), torch.stack((rotary.cos(), rotary.sin()), dim=-1)


@lru_cache(maxsize=16)
def _cached_position_tables(*args) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # a table first made while sampling must still serve training
        return _position_tables(*args)


def _rotate(hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turns the channel pairs (2i, 2i + 1) of `(B, N, heads, head_dim)` by the angles of `rotary`, in float32."""
    pairs = hidden_states.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler has no complex kernels, and fuses the real form
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:  # one kernel each way
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return pairs.flatten(-2)


def _rms_norm(hidden_states: torch.Tensor) -> torch.Tensor:
    """Divides by the root mean square over the last dimension. No weight: modulation or rotation follows."""
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)


def _trains_slowly_fused(query: torch.Tensor) -> bool:
    """Whether the backward pass of PyTorch's fused attention takes several times as long as plain products: bfloat16 on a CPU."""
    is_bfloat16_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return is_bfloat16_on_cpu and query.requires_grad and query.shape[1] <= _FEW_TOKENS


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention by plain products, `(B, N, heads, head_dim)`; the softmax is in float32, as in fused kernels."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)


def _attend(
    processor: "DAEDiTAttnProcessor | DAEDiTCrossAttnProcessor",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention through diffusers' dispatcher, unless nobody has chosen how and plain products are faster."""
    backend, parallel_config = processor._attention_backend, processor._parallel_config
    if backend is None and parallel_config is None and _trains_slowly_fused(query):
        return _attention(query, key, value, mask)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel_config)


class DAEDiTAttnProcessor:
    """Self-attention over `(B, N, dim)` through diffusers' dispatcher, so that `set_attention_backend` decides how."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "DAEDiTAttention", hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        query, key, value = attn.qkv_proj(hidden_states).unflatten(-1, (3, attn.heads, attn.head_dim)).unbind(2)
        # The rotation is in float32; kernels want one dtype for all three.
        query = _rotate(_rms_norm(query), rotary).to(value.dtype)
        key = _rotate(_rms_norm(key), rotary).to(value.dtype)
        return attn.out_proj(_attend(self, query, key, value).flatten(2))


class DAEDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention: one product for query, key and value, RMS norm of query and key per head."""

    _default_processor_cls = DAEDiTAttnProcessor
    _available_processors = [DAEDiTAttnProcessor]
    _supports_qkv_fusion = False  # fused from the start

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.set_processor(DAEDiTAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary)


class DAEDiTCrossAttnProcessor:
    """Attention of `(B, N, dim)` to `(B, T, dim)`, through diffusers' dispatcher; `mask` `(B, 1, 1, T)` is true where there is text."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "DAEDiTCrossAttention", hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        query = attn.q_proj(hidden_states).unflatten(-1, (attn.heads, attn.head_dim))
        key, value = attn.kv_proj(text).unflatten(-1, (2, attn.heads, attn.head_dim)).unbind(2)
        query, key = (_rms_norm(each).to(value.dtype) for each in (query, key))
        return attn.out_proj(_attend(self, query, key, value, mask).flatten(2))


class DAEDiTCrossAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of the image's tokens to those of a text, RMS norm of query and key per head."""

    _default_processor_cls = DAEDiTCrossAttnProcessor
    _available_processors = [DAEDiTCrossAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.set_processor(DAEDiTCrossAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.processor(self, hidden_states, text, mask)


class DAEDiTNumberEmbedding(nn.Module):
    """
    Embeds normalised numbers `(B,)` into `(B, dim)`: the number, and sine and cosine of its multiples, through two layers. NaN stands for
    an unknown number and gives zeros.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(2 + 2 * len(NUMBER_OCTAVES), dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim, bias=False)

    def forward(self, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        known = ~numbers.isnan()
        numbers = torch.where(known, numbers, 0.0).float()
        octaves = torch.arange(NUMBER_OCTAVES.start, NUMBER_OCTAVES.stop, device=numbers.device, dtype=torch.float32)
        angles = numbers[:, None] * octaves.exp2()  # made where it is needed: a copy from the CPU would hold a GPU up
        features = (torch.ones_like(angles[:, :1]), numbers[:, None], angles.sin(), angles.cos())
        features = torch.cat(features, dim=1) * known[:, None]
        return self.linear_2(F.silu(self.linear_1(features.to(dtype))))


class DAEDiTFeedForward(nn.Module):
    """SwiGLU, `down(silu(gate) * up)`, with gate and up in one product. Source: Shazeer, 2020, 2002.05202."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DAEDiTBlock(nn.Module):
    """
    Attention and feed-forward, each behind a modulated RMS norm and a gate: `x + gate * f(norm(x) * scale + shift)`. With text, between
    them, attention to it: `x + f(norm(x), text)`.
    """

    def __init__(self, dim: int, heads: int, hidden_dim: int, has_text: bool = False):
        super().__init__()
        self.attn = DAEDiTAttention(dim, heads)
        self.ff = DAEDiTFeedForward(dim, hidden_dim)
        self.cross_attn = DAEDiTCrossAttention(dim, heads) if has_text else None

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, N, dim)
        shift: torch.Tensor,  # (B, 2, 1, dim): attention, feed-forward; likewise below
        scale: torch.Tensor,
        gate: torch.Tensor,
        rotary: torch.Tensor,
        text: torch.Tensor | None = None,  # (B, T, dim)
        text_mask: torch.Tensor | None = None,  # (B, 1, 1, T)
    ) -> torch.Tensor:
        shift_attn, shift_ff = shift.unbind(1)
        scale_attn, scale_ff = scale.unbind(1)
        gate_attn, gate_ff = gate.unbind(1)
        attn_output = self.attn(torch.addcmul(shift_attn, _rms_norm(hidden_states), scale_attn), rotary)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attn_output)
        if text is not None:
            hidden_states = hidden_states + self.cross_attn(_rms_norm(hidden_states), text, text_mask)
        ff_output = self.ff(torch.addcmul(shift_ff, _rms_norm(hidden_states), scale_ff))
        return torch.addcmul(hidden_states, gate_ff, ff_output)


class DAEDiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin):
    r"""
    A diffusion transformer on latents of any height and width, conditioned on time and, optionally, on a class, a text, further
    classes ("attributes"), numbers and an image.

    It is called like [`DiTTransformer2DModel`]. The differences are: RMS norm, QK norm, SwiGLU, 2-D rotary positions in addition to
    absolute ones, rectangular latents, and conditioning that is computed once per step, for all blocks in one product.
    Labels are never dropped inside: to train classifier-free guidance, replace labels of samples with `null_class`.
    The tokens of a text come from an encoder outside; each block attends to them.
    Attributes and numbers are added to the class, each with an embedding of its own; the image is added to the latents, token by token.
    What is unknown of these three adds nothing.
    A new model predicts zero, and each of its blocks is the identity (adaLN-Zero).

    Args:
        sample_size (`int` or pair of `int`, defaults to 32):
            Latent size, or (height, width), that the model is trained on. It is the default for sampling; `forward` accepts
            any size that is a multiple of `patch_size`.
        patch_size (`int`, defaults to 2): Side of the square of latents that becomes one token.
        in_channels (`int`, defaults to 4): Latent channels.
        out_channels (`int`, *optional*): Channels of the prediction; `in_channels` if not given.
        num_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 6): Heads; the width is `num_attention_heads * attention_head_dim`.
        attention_head_dim (`int`, defaults to 64): Channels per head, a multiple of 4 (row and column, sine and cosine).
        num_classes (`int`, *optional*): Number of classes without the null class. `None` makes the model unconditional.
        mlp_ratio (`float`, defaults to 4.0):
            Size of the feed-forward part. SwiGLU's hidden width is `2/3 * mlp_ratio * width`, rounded up to a multiple of
            32, so that it has as many weights as a plain MLP of this ratio.
        cross_attention_dim (`int`, *optional*): Channels of the text encoder's hidden states. `None`: the model takes no text.
        num_attribute_classes (`list` of `int`, *optional*): Number of classes of each attribute.
        num_continuous (`int`, defaults to 0): How many numbers the model takes.
        condition_channels (`int`, defaults to 0): Channels of the condition image on the latents' grid; 0: the model takes none.
        flow_map (`bool`, defaults to `False`):
            Whether the model predicts the mean velocity from `timestep` down to a second noise level, `r_timestep`, so that a few long
            steps draw an image. Without `r_timestep` both are equal, and it predicts the velocity.

    Raises:
        `ValueError`: If `attention_head_dim` is not a multiple of 4, or `sample_size` is not a multiple of `patch_size`.

    Sources: Peebles and Xie, 2022, https://huggingface.co/papers/2212.09748; rotary positions: Su et al., 2021,
    https://huggingface.co/papers/2104.09864; in 2-D: Heo et al., 2024, https://huggingface.co/papers/2403.13298; mean velocities: Geng et
    al., 2025, https://huggingface.co/papers/2505.13447.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DAEDiTBlock"]
    _repeated_blocks = ["DAEDiTBlock"]
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "time_embed",
        "interval_embed",
        "label_embed",
        "text_embed",
        "attribute_embeds",
        "continuous_embeds",
        "condition_embed",
        "modulation",
        "proj_out",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_classes: int | None = None,
        mlp_ratio: float = 4.0,
        cross_attention_dim: int | None = None,
        num_attribute_classes: list[int] | None = None,
        num_continuous: int = 0,
        condition_channels: int = 0,
        flow_map: bool = False,
    ):
        super().__init__()
        if attention_head_dim % 4:
            raise ValueError(
                f"`attention_head_dim` is {attention_head_dim}, but must be a multiple of 4 (sine and cosine of row and "
                f"column). Use {math.ceil(attention_head_dim / 4) * 4}."
            )
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if any(side % patch_size for side in sides):
            raise ValueError(
                f"`sample_size` is {sample_size}, but must be a multiple of `patch_size` ({patch_size}). "
                f"Use {[math.ceil(side / patch_size) * patch_size for side in sides]} or another `patch_size`."
            )
        dim = num_attention_heads * attention_head_dim
        hidden_dim = math.ceil(2 / 3 * mlp_ratio * dim / 32) * 32
        out_channels = in_channels if out_channels is None else out_channels

        self.patch_embed = nn.Linear(patch_size**2 * in_channels, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, dim)
        self.label_embed = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        # Shift, scale and gate for both parts of each block, then shift and scale of the last norm.
        self.modulation = nn.Linear(dim, (6 * num_layers + 2) * dim)
        self.transformer_blocks = nn.ModuleList(
            DAEDiTBlock(dim, num_attention_heads, hidden_dim, cross_attention_dim is not None)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)
        self.text_embed = None if cross_attention_dim is None else PixArtAlphaTextProjection(cross_attention_dim, dim)
        self.attribute_embeds = nn.ModuleList(
            nn.Embedding(count + 1, dim, padding_idx=count) for count in num_attribute_classes or ()
        )
        self.continuous_embeds = nn.ModuleList(DAEDiTNumberEmbedding(dim) for _ in range(num_continuous))
        condition_size = patch_size**2 * condition_channels
        self.condition_embed = nn.Linear(condition_size, dim, bias=False) if condition_channels else None
        self.interval_embed = TimestepEmbedding(256, dim) if flow_map else None
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self):
        # Classes and time begin at unit size, not at the 0.02 of Peebles and Xie: small ones are learnt late, since `modulation` is zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.proj_out.weight)
        for block in self.transformer_blocks:
            if block.cross_attn is not None:
                nn.init.zeros_(block.cross_attn.out_proj.weight)
        if self.interval_embed is not None:
            nn.init.zeros_(self.interval_embed.linear_2.weight)

    @staticmethod
    def size_kwargs(name: str) -> dict[str, int]:
        """
        Constructor arguments of a named size: `DAEDiTTransformer2DModel(**size_kwargs("DiT-S/2"), num_classes=10)`.

        Args:
            name (`str`): A key of `DIT_SIZES`, a slash and the patch size, such as `"DiT-S/2"` or `"DiT-Ti/1"`.

        Returns:
            `dict`: `patch_size`, `num_layers`, `num_attention_heads`, `attention_head_dim`.

        Raises:
            `ValueError`: If the size does not exist or the patch size is not a positive integer.
        """
        size, _, patch_size = name.partition("/")
        if size not in DIT_SIZES or not patch_size.isdecimal() or int(patch_size) == 0:
            raise ValueError(
                f"`{name}` is not a size. Write one of {', '.join(DIT_SIZES)}, a slash and the patch size, "
                "for example `DiT-S/2`."
            )
        num_layers, dim, heads = DIT_SIZES[size]
        return {
            "patch_size": int(patch_size),
            "num_layers": num_layers,
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
        }

    @property
    def null_class(self) -> int | None:
        """The label that means "no class": `num_classes`, or `None` if the model is unconditional."""
        return self.config.num_classes

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attribute_labels: torch.Tensor | None = None,
        continuous: torch.Tensor | None = None,
        condition_image: torch.Tensor | None = None,
        r_timestep: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Predicts the velocity `noise - latents` (or whatever it was trained to predict) from noisy latents.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, in_channels, h, w)`):
                Noisy normalised latents; `h` and `w` are multiples of `patch_size`.
            timestep (`torch.Tensor` of shape `(B,)`, `(1,)` or `()`): Noise level, `1000 * sigma`, in [0, 1000].
            class_labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                Classes in [0, num_classes]; `num_classes`, or leaving it out, is the null class.
            return_dict (`bool`, defaults to `True`): Return a [`Transformer2DModelOutput`] rather than a tuple.
            encoder_hidden_states (`torch.Tensor` of shape `(B, T, cross_attention_dim)`, *optional*):
                The text encoder's hidden states, for a model that takes text; for no text, those of the empty text.
            encoder_attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                True or 1 for a token, at least one in each text; 0 for padding, which changes nothing. Default: all are tokens.
            attribute_labels (`torch.LongTensor` of shape `(B, len(num_attribute_classes))`, *optional*):
                The class of each attribute; the number of its classes, or leaving all out, stands for unknown.
            continuous (`torch.Tensor` of shape `(B, num_continuous)`, *optional*):
                Normalised numbers; NaN, or leaving all out, stands for unknown.
            condition_image (`torch.Tensor` of shape `(B, condition_channels, h, w)`, *optional*):
                An image on the latents' grid; zeros, or leaving it out, stand for none.
            r_timestep (`torch.Tensor` of shape `(B,)`, `(1,)` or `()`, *optional*):
                For a flow map: the noise level that a step leads to, `1000 * sigma`, at most `timestep`, which is the default.

        Returns:
            [`Transformer2DModelOutput`] or `tuple`: `sample` of shape `(B, out_channels, h, w)`.

        Raises:
            `ValueError`: If a shape does not fit, labels are given to a model without classes, a text, conditions or a second noise level
                to one without them, or if the text is missing.
        """
        self._check_inputs(hidden_states, timestep, class_labels, r_timestep)
        self._check_text(len(hidden_states), encoder_hidden_states, encoder_attention_mask)
        self._check_conditions(hidden_states, attribute_labels, continuous, condition_image)
        patch_size = self.config.patch_size
        batch_size, _, height, width = hidden_states.shape
        grid = (height // patch_size, width // patch_size)
        dim = self.patch_embed.out_features
        dtype = hidden_states.dtype

        # Under autocast the residual stream keeps the latents' float32, as the positions have it.
        tables = _position_tables if torch.compiler.is_compiling() else _cached_position_tables
        positions, rotary = tables(*grid, dim, self.config.attention_head_dim, hidden_states.device)
        hidden_states = F.pixel_unshuffle(hidden_states, patch_size).flatten(2).transpose(1, 2)
        hidden_states = self.patch_embed(hidden_states) + positions.to(dtype)  # (B, N, dim)
        if condition_image is not None:
            condition_image = F.pixel_unshuffle(condition_image.to(dtype), patch_size).flatten(2).transpose(1, 2)
            hidden_states = hidden_states + self.condition_embed(condition_image)

        conditioning = self.time_embed(self.time_proj(timestep.expand(batch_size)).to(dtype))
        if self.interval_embed is not None:
            interval = timestep - (timestep if r_timestep is None else r_timestep)
            conditioning = conditioning + self.interval_embed(self.time_proj(interval.expand(batch_size)).to(dtype))
        if self.label_embed is not None:
            if class_labels is None:
                class_labels = torch.full((batch_size,), self.null_class, device=hidden_states.device)
            conditioning = conditioning + self.label_embed(class_labels)
        if attribute_labels is not None:
            for embed, labels in zip(self.attribute_embeds, attribute_labels.unbind(1), strict=True):
                conditioning = conditioning + embed(labels)
        if continuous is not None:
            for embed, numbers in zip(self.continuous_embeds, continuous.unbind(1), strict=True):
                conditioning = conditioning + embed(numbers, dtype)
        # `1 + scale` in the residual stream's dtype: in bfloat16 small scales would vanish.
        modulation = self.modulation(F.silu(conditioning)).to(hidden_states.dtype)
        blocks, last = modulation.split((modulation.shape[1] - 2 * dim, 2 * dim), dim=1)
        shift, scale, gate = blocks.view(batch_size, -1, 3, 2, 1, dim).unbind(2)  # each (B, num_layers, 2, 1, dim)
        shift_last, scale_last = last.view(batch_size, 2, 1, dim).unbind(1)

        text = ()
        if encoder_hidden_states is not None:
            mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None]
            text = (self.text_embed(_rms_norm(encoder_hidden_states.to(dtype))), mask)

        for block, *modulated in zip(
            self.transformer_blocks, shift.unbind(1), (1 + scale).unbind(1), gate.unbind(1), strict=True
        ):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *modulated, rotary, *text)
            else:
                hidden_states = block(hidden_states, *modulated, rotary, *text)

        hidden_states = self.proj_out(torch.addcmul(shift_last, _rms_norm(hidden_states), 1 + scale_last))
        sample = F.pixel_shuffle(hidden_states.transpose(1, 2).unflatten(2, grid), patch_size)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        r_timestep: torch.Tensor | None,
    ):
        in_channels, patch_size = self.config.in_channels, self.config.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != in_channels:
            raise ValueError(
                f"`hidden_states` has shape {tuple(hidden_states.shape)}, but must be (B, {in_channels}, h, w). "
                f"Is this the transformer for this autoencoder? It has `in_channels={in_channels}`."
            )
        batch_size, _, height, width = hidden_states.shape
        if height % patch_size or width % patch_size or not height or not width:
            nearest = [max(1, round(side / patch_size)) * patch_size for side in (height, width)]
            raise ValueError(
                f"`hidden_states` is {height} x {width}, but both sides must be multiples of `patch_size` "
                f"({patch_size}). The nearest size is {nearest[0]} x {nearest[1]}."
            )
        if r_timestep is not None and self.interval_embed is None:
            raise ValueError(
                "`r_timestep` was given, but this transformer is no flow map (`flow_map=False`). Leave it out, or distill one: "
                "training/train_dit.py with `--distill_guidance_scale`."
            )
        for name, value in {"timestep": timestep, "r_timestep": r_timestep}.items():
            if value is not None and value.shape not in ((), (1,), (batch_size,)):
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}, but must be ({batch_size},), one per sample, or a scalar."
                )
        if class_labels is None:
            return
        if self.null_class is None:
            raise ValueError(
                "`class_labels` were given, but this transformer is unconditional (`num_classes=None`). "
                "Leave them out, or build it with `num_classes`."
            )
        if class_labels.shape != (batch_size,) or class_labels.is_floating_point():
            raise ValueError(
                f"`class_labels` has shape {tuple(class_labels.shape)} and dtype {class_labels.dtype}, but must hold "
                f"{batch_size} integers, one per sample."
            )

    def _check_text(self, batch_size: int, states: torch.Tensor | None, mask: torch.Tensor | None):
        channels = self.config.cross_attention_dim
        if channels is None and states is None:
            return
        if channels is None:
            raise ValueError(
                "`encoder_hidden_states` were given, but this transformer takes no text (`cross_attention_dim=None`). "
                "Leave them out, or build it with `cross_attention_dim`."
            )
        if states is None or states.ndim != 3 or (len(states), states.shape[2]) != (batch_size, channels):
            raise ValueError(
                f"`encoder_hidden_states` are {'missing' if states is None else f'of shape {tuple(states.shape)}'}, but must "
                f"be ({batch_size}, T, {channels}): the text encoder's hidden states. For no text, encode the empty text."
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"`encoder_attention_mask` has shape {tuple(mask.shape)}, but must be {tuple(states.shape[:2])}, a number "
                "per token of `encoder_hidden_states`."
            )

    def _check_conditions(self, hidden_states: torch.Tensor, *given: torch.Tensor | None):
        batch_size, _, *sides = hidden_states.shape
        config = self.config
        counts = (len(config.num_attribute_classes or ()), config.num_continuous, config.condition_channels)
        names = {"attribute_labels": "num_attribute_classes", "continuous": "num_continuous"}
        names["condition_image"] = "condition_channels"
        for (name, option), value, count in zip(names.items(), given, counts, strict=True):
            if value is None:
                continue
            if not count:
                raise ValueError(
                    f"`{name}` was given, but this transformer takes none (`{option}={config[option]}`). Leave it out, or build "
                    f"it with `{option}`."
                )
            wanted = (batch_size, count, *(sides if name == "condition_image" else ()))
            if value.shape != wanted:
                raise ValueError(f"`{name}` has shape {tuple(value.shape)}, but must be {wanted}.")
