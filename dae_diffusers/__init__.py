"""Train a latent diffusion model on your own images: decoupled autoencoders, a DiT, an autoregressive prior, and their pipelines."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use, so that `import dae_diffusers` loads no torch.
_PUBLIC = {
    "DAEAsymmetricAutoencoderKL": "dae_diffusers.autoencoder_dae_asymmetric",
    "DAEAsymmetricVQModel": "dae_diffusers.autoencoder_dae_asymmetric",
    "DAEAutoencoderKL": "dae_diffusers.autoencoders.autoencoder_kl",
    "DAEDiTImg2ImgPipeline": "dae_diffusers.pipelines.dae_dit_img2img",
    "DAEDiTInpaintPipeline": "dae_diffusers.pipelines.dae_dit_inpaint",
    "DAEDiTInterpolationPipeline": "dae_diffusers.pipelines.dae_dit_interpolate",
    "DAEDiTPipeline": "dae_diffusers.pipelines.dae_dit",
    "DAEDiTTransformer2DModel": "dae_diffusers.transformer_dae_dit",
    "DAEVQGANPipeline": "dae_diffusers.pipelines.dae_vqgan",
    "DAEVQModel": "dae_diffusers.autoencoders.vq_model",
    "DecoupledAutoencoderMixin": "dae_diffusers.autoencoders.decoupled",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names are {sorted(_PUBLIC)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted(__all__)
