"""What judges autoencoders, latent spaces and generators."""
