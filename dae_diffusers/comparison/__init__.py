"""Compares latent spaces: runs the training scripts in processes of their own, and measures and keeps what comes out."""
