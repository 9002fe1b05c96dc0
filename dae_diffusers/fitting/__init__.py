"""Stage 3: fitting a decoder to the latents that a generator draws."""
