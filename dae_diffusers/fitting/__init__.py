"""Stage 3 fits a decoder to the latents that a generator draws; `side_by_side` puts a decoder and a generator together."""
