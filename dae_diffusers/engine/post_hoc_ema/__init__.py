"""Post-hoc EMA: averages of the weights whose length is chosen after training, from snapshots of two averages."""
