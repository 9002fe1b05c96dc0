"""The complexity distance: how simple a generator suffices to turn latents into images."""
