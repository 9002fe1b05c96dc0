"""Pipelines, each one file that needs torch and diffusers only, so that it travels to the Hub with the weights."""
