"""Latents between the autoencoder and the generator: their statistics, and a cache of them."""
