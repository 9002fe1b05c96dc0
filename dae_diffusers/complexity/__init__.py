"""The complexity distance: how well small generators, trained for a short time, model a latent space."""
