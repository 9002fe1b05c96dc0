"""Tiny models with random weights, and latents for a codebook."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, VQModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DPRConfig,
    DPRQuestionEncoder,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from dae_diffusers import DAEAutoencoderKL, DAEDiTPipeline, DAEDiTTransformer2DModel, DAEVQGANPipeline, DAEVQModel
from dae_diffusers.pipelines.dae_vqgan import code_fingerprint
from dae_diffusers.plots import image_grid

TINY_AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 3,
    "sample_size": 16,
    "mid_block_add_attention": False,
}
TINY_TRANSFORMER = {
    "sample_size": 8,
    "in_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
}
QUANTIZERS = {
    "vq": {"quantizer_type": "vq"},
    "vq_l2": {"quantizer_type": "vq", "quantizer_l2_normalize": True},
    "ema": {"quantizer_type": "ema", "quantizer_warmup_steps": 1},
    "ema_l2": {"quantizer_type": "ema", "quantizer_warmup_steps": 1, "quantizer_l2_normalize": True},
    "fsq": {"quantizer_type": "fsq", "quantizer_fsq_levels": (4, 3, 2), "num_vq_embeddings": 24},
}

PRIOR_NAMES = {0: "tabby, cat", 1: "Crane, bird", 2: "crane, hoist"}
NUM_CODES = 16


def make_autoencoder(auxiliary_decoder_type: str = "dropout", **config) -> DAEAutoencoderKL:
    torch.manual_seed(0)
    return DAEAutoencoderKL(**{**TINY_AUTOENCODER, **config}, auxiliary_decoder_type=auxiliary_decoder_type)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Gives a model random weights: a new transformer predicts zero, whatever it is given."""
    torch.manual_seed(1)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def make_random_transformer(**config) -> DAEDiTTransformer2DModel:
    return randomize(DAEDiTTransformer2DModel(**{**TINY_TRANSFORMER, **config}))


def save_autoencoder(folder: Path) -> Path:
    """Saves what a user would have trained: without the auxiliary decoder, with statistics of the latents."""
    autoencoder = make_autoencoder()
    autoencoder.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3, scaling_factor=1.0)
    autoencoder.to_diffusers().save_pretrained(folder)
    return folder


def make_vq_model(quantizer: str = "ema_l2", auxiliary_decoder_type: str = "dropout", **config) -> DAEVQModel:
    torch.manual_seed(0)
    config = {**TINY_AUTOENCODER, "num_vq_embeddings": 16, **QUANTIZERS[quantizer], **config}
    return DAEVQModel(**config, auxiliary_decoder_type=auxiliary_decoder_type)


def make_video_autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])


def save_backbone(folder: Path, kind: str) -> str:
    """Saves a vision model and its image processor: `resnet`, `vit`, or a ResNet `classifier` of three classes."""
    torch.manual_seed(0)
    mean, std = ([0.5] * 3, [0.5] * 3) if kind == "classifier" else ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    if kind == "vit":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32
        )
        config.patch_size = 8
        model = ViTModel(config)
    else:
        sizes = [8, 8] if kind == "classifier" else [8, 16]  # fewer features than the tests have images
        config = ResNetConfig(embedding_size=8, hidden_sizes=sizes, depths=[1, 1], layer_type="basic", num_labels=3)
        model_class = ResNetForImageClassification if kind == "classifier" else ResNetModel
        model = model_class(config)
    model.eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def save_tokenizer(folder: Path, *, marks: bool = True) -> None:
    """A tokenizer of ten words, with a mark at both ends of a text or without."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a red green blue apple cat dog big small picture".split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def save_text_encoder(folder: Path, kind: str = "bert", *, marks: bool = True) -> str:
    """Saves a text encoder of 16 channels with random weights, and its tokenizer: `bert`, `clip`, `t5`, or `dpr`, which gives no tokens."""
    torch.manual_seed(0)
    size = {
        "vocab_size": 14,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if kind == "clip":
        halves = {
            "text_config": {**size, "eos_token_id": 3},
            "vision_config": {**size, "image_size": 8, "patch_size": 4},
        }
        model = CLIPModel(CLIPConfig(**halves, projection_dim=8))
    elif kind == "t5":
        model = T5EncoderModel(T5Config(vocab_size=14, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    else:
        model = BertModel(BertConfig(**size)) if kind == "bert" else DPRQuestionEncoder(DPRConfig(**size))
    model.save_pretrained(folder)
    save_tokenizer(folder, marks=marks)
    return str(folder)


def save_clip(folder: Path, kind: str = "clip") -> str:
    """Saves a model that compares images with texts, `clip` or `siglip`, with random weights, its tokenizer and image processor."""
    save_text_encoder(folder, "clip")
    if kind == "siglip":
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        halves = {
            "text_config": {**size, "vocab_size": 14, "projection_size": 16, "max_position_embeddings": 8},
            "vision_config": {**size, "image_size": 8, "patch_size": 4},
        }
        SiglipModel(SiglipConfig(**halves)).save_pretrained(folder)
    size = {"height": 8, "width": 8} if kind == "siglip" else {"shortest_edge": 8}
    processor = {"size": size, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def make_plain_vq_model(seed=0, **config) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(**{**TINY_AUTOENCODER, "num_vq_embeddings": NUM_CODES, **config}).eval()


def make_prior(vae, num_classes=3, grid_size=(4, 4)) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_CODES + num_classes + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=grid_size[0] * grid_size[1],
        initializer_range=0.3,  # far from uniform, so that wrong logits draw other codes
        bos_token_id=None,
        eos_token_id=None,
        num_codes=NUM_CODES,
        num_classes=num_classes,
        grid_size=list(grid_size),
        code_fingerprint=code_fingerprint(vae),
    )
    return LlamaForCausalLM(config).eval()


def make_prior_pipeline(num_classes=3, id2label=PRIOR_NAMES, grid_size=(4, 4)) -> DAEVQGANPipeline:
    vae = make_plain_vq_model()
    pipeline = DAEVQGANPipeline(make_prior(vae, num_classes, grid_size), vae, id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clusters(count=12, dim=4, **options):
    """Micro-batches of four tight clusters of latents."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(4, dim, generator=generator) * 3
    batches = []
    for _ in range(count):
        vectors = centres[torch.randint(4, (64,), generator=generator)]
        vectors = vectors + 0.01 * torch.randn(64, dim, generator=generator)
        batches.append(vectors.view(1, 8, 8, dim).permute(0, 3, 1, 2))
    return centres, batches


def uneven_clusters(count=12):
    """The same micro-batches, of 64, 56 and 48 latents in turn."""
    return [batch[:, :, : 8 - number % 3] for number, batch in enumerate(clusters(count)[1])]


def save_run(folder: Path, id2label: dict[int, str] | None) -> Path:
    """A tiny, untrained pipeline with what a run leaves beside it."""
    torch.manual_seed(0)
    vae = make_autoencoder(sample_size=16).to_diffusers()
    transformer = DAEDiTTransformer2DModel(
        sample_size=8,
        in_channels=3,
        num_classes=None if id2label is None else len(id2label),
        patch_size=2,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
    )
    pipeline = DAEDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler(), id2label=id2label)
    pipeline.save_pretrained(folder / "pipeline")
    image_grid(torch.rand(6, 3, 16, 16) * 2 - 1).save(folder / "samples.png")
    (folder / "metrics.json").write_text('{"class_agreement": 0.5, "num_images": 10}')
    return folder
