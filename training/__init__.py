"""The training scripts. Run them with `accelerate launch`; each prints its flags with `--help`."""
