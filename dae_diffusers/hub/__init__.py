"""Publishing on the Hub: what a run has left, its model card, and the upload."""

from dae_diffusers.hub.upload import check_hub_access, push_folder

__all__ = ["check_hub_access", "push_folder"]
