"""Settings of the upload of a training run. Needs no torch."""

from typing import Literal

from dae_diffusers.errors import ConfigError
from dae_diffusers.hub.names import check_repo_id
from dae_diffusers.settings import field, settings


@settings
class HubConfig:
    """Publishing."""

    push_to_hub: bool = field(False, "upload the result to the Hub; see also the script `push`")
    hub_model_id: str | None = field(
        None,
        "repository on the Hub; default: the output folder's name in your account",
        needs="push_to_hub",
        advanced=True,
    )
    hub_private_repo: bool = field(
        False, "make a new repository private, and refuse one that is public", needs="push_to_hub", advanced=True
    )
    hub_license: str | None = field(
        None,
        "license of the weights, as the Hub names it (such as cc-by-4.0); you choose it",
        needs="push_to_hub",
        advanced=True,
    )
    hub_strategy: Literal["end", "every_save"] = field(
        "end",
        "end: upload the result; every_save: also at each checkpoint, in the background",
        needs="push_to_hub",
        advanced=True,
    )

    def __post_init__(self):
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "hub_model_id")

    def check_snapshots(self, has_decoder: bool) -> None:
        """Checks that what is published during training can be decoded."""
        if self.push_to_hub and self.hub_strategy == "every_save" and not has_decoder:
            raise ConfigError(
                "`hub_strategy every_save` does not go with the `vae` of a stage 1, whose decoder is not finished; use `end`."
            )
