"""Publishing on the Hub: reading a run's results, the model card, the upload, and a Space to try the model."""
