"""Finds the best latent space for some images within a budget of time."""
