"""Autoencoders trained in two stages; each is a subclass of a diffusers class."""
