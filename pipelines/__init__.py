"""Pipelines. Each is one file that needs only torch, diffusers and (for VQGAN) transformers, and is uploaded with the weights."""
