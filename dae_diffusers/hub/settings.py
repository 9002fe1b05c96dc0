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
    hub_strategy: Literal["end", "every_save", "checkpoint"] = field(
        "end",
        "end: upload the result; every_save: also at each checkpoint, in the background; checkpoint: also each checkpoint, so that "
        "`resume_from_checkpoint latest` goes on on another machine",
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


@settings
class PushConfig:
    """Publishing."""

    LEADING = "FOLDER USER/NAME "

    folder: str = field(help="output folder of a training run, or a pipeline's folder (also the first word)")
    repo_id: str = field(help="`user/name` on the Hub (also the second word)")
    license: str | None = field(
        None,
        "license of the weights, as the Hub names it, such as cc-by-4.0; default: that of the card on the Hub, else the answer "
        "to a question in the terminal, else none",
    )
    private: bool = field(False, "make a new repository private, and refuse one that is public")
    revision: str | None = field(None, "branch, created if missing; default: main")
    create_pr: bool = field(False, "open a pull request instead of writing to the branch")
    fp16: bool = field(False, 'add half-precision weights, for `variant="fp16"`')
    data_pictures: bool = field(
        False,
        "also publish pictures that show your data set: held-out images, training images nearest to samples, captions",
    )
    no_data_pictures: bool = field(
        False, "leave these pictures out; the default, unless all data sets are public or you agree in the terminal"
    )
    keep_card: bool = field(False, "do not change the README.md of the repository")
    stage1: bool = field(False, "also upload the autoencoder of stage 1, to the branch `stage1`")
    space: bool = field(False, "also make a Space, an app in which others can try the model")
    space_id: str | None = field(None, "`user/name` of the Space; default: that of the model", needs="space")
    export_dir: str | None = field(
        None, "write everything into this folder and upload nothing; the Space in `space/`, stage 1 in `stage1/`"
    )

    def full_space_id(self, repo_id: str) -> str | None:
        """`user/name` of the Space of the model `repo_id`; None without one."""
        if not self.space:
            return None
        user, _, name = repo_id.rpartition("/")
        space = self.space_id or name
        return space if "/" in space or not user else f"{user}/{space}"

    def __post_init__(self):
        check_repo_id(self.repo_id)
        if self.space_id is not None:
            check_repo_id(self.space_id, "space_id")
        if self.data_pictures and self.no_data_pictures:
            raise ConfigError("`data_pictures` and `no_data_pictures` do not go together; leave one out.")
        if self.space and (self.revision is not None or self.create_pr):
            raise ConfigError(
                "`space` makes an app of the model on the branch `main`, so it does not go with `revision` or `create_pr`; push the "
                "Space when the model is on `main`."
            )
        if self.stage1 and (self.revision is not None or self.create_pr):
            raise ConfigError(
                "`stage1` uploads to the branch `stage1`, of the model on `main`, so it does not go with `revision` or "
                "`create_pr`; leave it out."
            )
        if self.export_dir is not None and "/" not in self.repo_id:
            raise ConfigError(f"`export_dir` needs the full `user/name` for the card, but got {self.repo_id!r}.")
        if self.export_dir is not None and (self.revision is not None or self.create_pr):
            raise ConfigError(
                "`export_dir` uploads nothing, so it does not go with `revision` or `create_pr`; leave them out."
            )
