"""Metrics of autoencoders, latent spaces and generators."""
