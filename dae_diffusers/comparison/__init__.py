"""Runs the training scripts in processes of their own, and measures what comes out."""
