"""The complexity distance: how well small generators turn latents into images."""
