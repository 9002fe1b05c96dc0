"""Training runs: the loop, and what surrounds it: folder, checkpoints, log, optimiser, several processes."""
