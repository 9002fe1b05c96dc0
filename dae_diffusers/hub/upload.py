"""Uploads to the Hub. Whatever goes wrong there, the trained model is on disk."""

import logging
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    RepoCard,
    RepoUrl,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    _http,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dae_diffusers.errors import UserError, one_line
from dae_diffusers.hub.card import GENERATORS, makes_pictures, repository_files, without_origin
from dae_diffusers.hub.results import NUMBERS, PICTURES, Result, is_leftover, read_result
from dae_diffusers.store import read_json_or
from dae_diffusers.weights import STATISTICS, have_other_encoders

logger = logging.getLogger(__name__)

STAGE1_BRANCH = "stage1"
# Seconds without a byte after which a request fails; the client retries an upload a few times. By default it waits forever.
CHECK_SECONDS = 15.0  # whether the Hub is there
UPLOAD_SECONDS = 60.0
_OF_OUR_APP = b"draw by class, look"  # in its description, since the first version
# Folders of our pipelines.
_PARTS = ("transformer", "guidance_transformer", "prior", "scheduler", "vae", "text_encoder", "tokenizer")
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # of diffusers, of transformers
# Names of weights, configs, code and pictures in an export.
_EXPORTED = re.compile(
    r"metrics\.json|training/\w+\.(yaml|json)|images/\w+\.png|\w+/((diffusion_pytorch_)?model(\.\w+)?(-\d+-of-\d+)?\.safetensors(\.index(\.\w+)?\.json)?"  # noqa: E501
    r"|(config|scheduler_config|generation_config|stage3)\.json|dae_diffusers\.\w+\.py|autoencoder_dae_asymmetric\.py)"
)


@cache
def _limit_every_client() -> None:
    """The client gives itself up after a failed connection; the one that follows must not wait forever either."""
    make = _http._GLOBAL_CLIENT_FACTORY  # huggingface_hub's, or one with a proxy that somebody has set

    def client():
        made = make()
        made.timeout = UPLOAD_SECONDS
        return made

    set_client_factory(client)


@contextmanager
def waiting_at_most(seconds: float | None = None) -> Iterator[None]:
    r"""
    Inside the `with` block, a request to the Hub fails after a time without a byte, instead of never.

    Args:
        seconds (`float`, *optional*): Defaults to `UPLOAD_SECONDS`.
    """
    _limit_every_client()
    session = get_session()
    before, session.timeout = session.timeout, UPLOAD_SECONDS if seconds is None else seconds
    try:
        yield
    finally:
        session.timeout = before


def check_hub_access(
    repo_id: str, *, private: bool = False, license: str | None = None, create_pr: bool = False
) -> str:
    r"""
    Creates the repository before training starts, so a missing token or permission shows at once.

    Args:
        repo_id (`str`): `user/name`, or `name` in the account of the token.
        private (`bool`, *optional*): Whether the repository must be private. By default a new one is as its owner's new ones are.
        license (`str`, *optional*): Checked as the Hub checks it.
        create_pr (`bool`, *optional*): Whether only a pull request is to be opened, which needs no right to write.

    Returns:
        `str`: The full `user/name`. If the Hub cannot be reached now, which is logged, the name as given.

    Raises:
        UserError: If the Hub does not let this token write to the repository, does not know the license, or if the repository is
            public and must be private.
    """
    api = HfApi()
    try:
        with waiting_at_most(CHECK_SECONDS):
            api.whoami()
            repo_id = _repository(api, repo_id, private=private).repo_id
            if not create_pr:
                api.auth_check(repo_id, write=True)
    except UserError:
        raise
    except Exception as error:  # a connection may fail in any way
        if _is_transient(error):
            logger.warning("the Hub does not answer now (%s); the upload will be tried anyway.", reason_of(error))
            return repo_id
        raise UserError(
            f"{repo_id} cannot be written on the Hub ({reason_of(error)}). Log in with `hf auth login`, or choose another "
            "repository. A training run can also go without `push_to_hub` and be pushed afterwards."
        ) from None
    if license is not None:
        check_license(license)
    return repo_id


def check_license(license: str) -> None:
    r"""
    Asks the Hub whether it knows a license.

    Raises:
        UserError: If it does not. If the Hub does not answer, the license is accepted.
    """
    card = ModelCard(f"---\n{ModelCardData(license=license).to_yaml()}\n---\n")
    try:
        with waiting_at_most(CHECK_SECONDS):
            card.validate()
    except ValueError as error:
        raise UserError(
            f"the Hub does not know the license {license!r} ({reason_of(error)}). Its identifiers are listed at "
            "https://huggingface.co/docs/hub/repositories-licenses; `other` is one."
        ) from None
    except Exception as error:  # a connection may fail in any way
        logger.warning("the license could not be checked now (%s).", reason_of(error))


@waiting_at_most()
def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    fp16: bool = False,
    keep_card: bool = False,
    step: int | None = None,
    space_id: str | None = None,
    data_pictures: bool | None = None,
) -> str:
    r"""
    Uploads a result in one commit: models, code, card, pictures, metrics and the training's flags.

    Args:
        folder (`str` or `Path`): See [`~dae_diffusers.hub.results.read_result`].
        repo_id (`str`): `user/name`, or `name` in the account of the token. It is created if it does not exist.
        private (`bool`, *optional*): As in [`check_hub_access`].
        license (`str`, *optional*): An identifier that the Hub knows. Default: that of the card on the Hub.
        revision (`str`, *optional*): Branch, created if it does not exist.
        create_pr (`bool`, *optional*): Open a pull request instead of writing to the branch.
        fp16 (`bool`, *optional*): Add half-precision weights, for `variant="fp16"`. Those of an earlier push are always made again,
            or removed if that is not possible, so nobody loads old weights together with new ones.
        keep_card (`bool`, *optional*): Do not change the `README.md` on the Hub.
        step (`int`, *optional*): During training: the number of steps done.
        space_id (`str`, *optional*): Name of the model's Space, for the card.
        data_pictures (`bool`, *optional*): Whether to publish pictures that show images of the data sets; default: if
            [`shows_public_images`]. Other pictures of an earlier push are removed.

    Returns:
        `str`: Address of the repository, or of the pull request.

    Raises:
        UserError: If the folder holds nothing to publish, the repository is public and must be private, or an autoencoder alone
            does not go with the pipeline that is there.
        Exception: Whatever the connection fails with.
    """
    result = read_result(folder)
    if result.doubts:
        logger.warning("%s", " ".join(result.doubts))
    api = HfApi()
    repository = _repository(api, repo_id, private=private)
    repo_id = repository.repo_id
    if revision is not None and not revision.startswith("refs/"):  # of a pull request
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card = published_card(repo_id, revision)
    if card is not None and not keep_card and is_of_others(card):
        logger.warning(
            "the README.md of %s was not written by dae_diffusers and stays. Remove it on the Hub to get a model card.",
            repo_id,
        )
        keep_card = True
    if card is not None:
        license, space_id = license or card.data.license, space_id or space_of(card)
    published = api.list_repo_files(repo_id, revision=revision)
    is_decoder_of_pipeline = result.pipeline is None and "model_index.json" in published
    if is_decoder_of_pipeline:
        _check_encoder(api, repository, result.vae, revision)
        logger.warning(
            "%s holds a pipeline: its card and metrics.json stay, and tell of the decoder that it had. Push the whole pipeline to "
            "renew them.",
            repository,
        )
    # Half-precision weights of an earlier push would stay beside the new ones.
    with_fp16 = fp16 or (not is_sharded(result) and any(name.endswith(".fp16.safetensors") for name in published))
    files = repository_files(
        result,
        repo_id,
        license=license,
        step=step,
        revision=revision,
        card=not (keep_card or is_decoder_of_pipeline),
        space_id=space_id,
        data_pictures=shows_public_images(result) if data_pictures is None else data_pictures,
        fp16=with_fp16,
    )
    if is_decoder_of_pipeline:
        files.pop("metrics.json", None)
    with tempfile.TemporaryDirectory() as temporary:
        if with_fp16:
            files.update(half_precision_files(files, Path(temporary)))
        commit = _commit(
            api,
            repo_id,
            files,
            message=f"Step {step}" if step is not None else f"Upload {result.index.get('_class_name', 'autoencoder')}",
            published=published,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or str(repository)


def is_sharded(result: Result) -> bool:
    r"""Whether a model of a result has its weights in several files."""
    return any(
        folder is not None and any(folder.rglob("*.safetensors.index.json")) for folder in (result.pipeline, result.vae)
    )


def is_private(repo_id: str, repo_type: str | None = None) -> bool:
    r"""Whether a repository on the Hub is private. Raises whatever the connection fails with."""
    return bool(HfApi().repo_info(repo_id, repo_type=repo_type, timeout=CHECK_SECONDS).private)


def _repository(api: HfApi, repo_id: str, *, private: bool, **kind: str) -> RepoUrl:
    """The repository, which is created if it does not exist. If it exists, it must be private where that is asked for."""
    repository = api.create_repo(repo_id, private=private or None, exist_ok=True, **kind)
    if private and not is_private(repository.repo_id, kind.get("repo_type")):
        raise UserError(
            f"{repository} exists and is public, but must be private: a flag asks for it, or its model is private. Make it private "
            "in its settings on the Hub, choose another, or leave the flag out."
        )
    return repository


def shows_public_images(result: Result) -> bool:
    r"""Whether anybody may see the images of training and evaluation: they come with the package, or anybody may read them on the Hub."""
    return not result.has_private_data and all(map(_is_public, result.data_sets))


def _check_encoder(api: HfApi, repository: RepoUrl, vae: Path, revision: str | None) -> None:
    """Refuses an autoencoder alone whose latents, or their statistics, the generator in the repository does not know."""
    wanted = {"allow_patterns": ["vae/*.safetensors*", "vae/config.json"], "ignore_patterns": "*.fp16*"}
    theirs = Path(api.snapshot_download(repository.repo_id, revision=revision, **wanted)) / "vae"
    if have_other_encoders(theirs, vae):
        raise UserError(
            f"{repository} holds a pipeline with another encoder than that of {vae}, whose latents its generator does not know. "
            "Push the autoencoder to another repository or branch (`--revision`), or push a whole pipeline."
        )
    configs = [read_json_or(folder / "config.json", {}) for folder in (theirs, vae)]
    other = next((name for name in STATISTICS if _differ(*(config.get(name) for config in configs))), None)
    if other is not None:
        raise UserError(
            f"{repository} holds a pipeline whose autoencoder has other `{other}` than {vae}, by which its generator's latents would be "
            "decoded wrongly. Put the decoder into the pipeline with `dae-diffusers assemble`, and push that."
        )


def _differ(first: Any, second: Any) -> bool:
    """Whether numbers differ by more than another machine's rounding."""
    if None in (first, second) or np.shape(first) != np.shape(second):
        return first != second
    return not np.allclose(first, second, rtol=1e-3, atol=1e-3 * np.abs(first).max())


def _is_public(name: str) -> bool:
    """Whether a data set is on the Hub and neither private nor gated. If the Hub does not say, it is not."""
    try:
        info = HfApi().dataset_info(name, token=False, timeout=CHECK_SECONDS)
    except Exception:  # a connection may fail in any way
        return False
    return not (info.private or info.gated)


def push_stage1(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    r"""
    Uploads the autoencoder of stage 1, with its auxiliary decoder, to the branch `stage1`.

    Args:
        folder, repo_id, private: As in [`push_folder`].

    Returns:
        `str`: Address of the branch.

    Raises:
        UserError: If there is no stage 1 in the folder.
    """
    return replace_branch(repo_id, STAGE1_BRANCH, stage1_files(folder), message="Upload stage 1", private=private)


def stage1_files(folder: str | Path) -> dict[str, Path | bytes]:
    r"""
    The autoencoder of stage 1 in the output folder of a run, by path in the repository.

    Raises:
        UserError: If there is none.
    """
    stage1 = Path(folder) / "stage1"
    if not (stage1 / "config.json").exists():
        raise UserError(f"{folder} has no stage1/config.json: it is not the output folder of training/train_dae.py.")
    return {
        f"stage1/{path.name}": without_origin(path) if path.suffix == ".json" else path
        for path in sorted(stage1.iterdir())
        if path.is_file() and not is_leftover(path)
    }


@waiting_at_most()
def replace_branch(
    repo_id: str,
    branch: str,
    files: dict[str, Path | bytes],
    *,
    message: str,
    private: bool = False,
    forgets: bool = False,
) -> str:
    r"""
    Makes files the content of a branch, in one commit: no other file stays.

    Args:
        repo_id, private: As in [`push_folder`].
        branch (`str`): Created if it does not exist.
        files (`dict`): Path in the repository to a file on disk or to content.
        message (`str`): Of the commit.
        forgets (`bool`, *optional*): Drop the earlier commits of the branch, with their large files.

    Returns:
        `str`: Address of the branch.

    Raises:
        Exception: Whatever the connection fails with.
    """
    api = HfApi()
    repository = _repository(api, repo_id, private=private)
    api.create_branch(repository.repo_id, branch=branch, exist_ok=True)
    # A new branch begins as a copy of `main`, which may have pictures and cards that `main` will lose.
    published = api.list_repo_files(repository.repo_id, revision=branch)
    stale = [name for name in published if name not in files and name != ".gitattributes"]
    _commit(api, repository.repo_id, files, message=message, stale=stale, revision=branch)
    if forgets:
        with suppress(Exception):  # the files are there; the next call drops these commits too
            api.super_squash_history(repository.repo_id, branch=branch, commit_message=message)
    return f"{repository}/tree/{branch}"


@waiting_at_most()
def push_space(repo_id: str, model_id: str, *, private: bool = False) -> str:
    r"""
    Makes a Space with the app of [`space_files`] for a model.

    Args:
        repo_id (`str`): Name of the Space.
        model_id (`str`): Name of the model, `user/name`.
        private (`bool`, *optional*): Whether the Space must be private. That of a private model always must.

    Returns:
        `str`: Its address.

    Raises:
        UserError: If there is a Space of this name with another app, or it must be private and is not.
    """
    api = HfApi()
    private = private or is_private(model_id)
    is_there = api.repo_exists(repo_id, repo_type="space")
    repository = _repository(api, repo_id, private=private, repo_type="space", space_sdk="gradio")
    check_app(repository.repo_id)
    _commit(api, repository.repo_id, space_files(model_id), message="Upload the app", repo_type="space")
    if is_there:
        try:
            api.restart_space(repository.repo_id)  # it read the weights when it started
        except Exception as error:  # a connection may fail in any way
            logger.warning(
                "the Space %s could not be restarted (%s) and may show the weights before. Restart it in its settings.",
                repository,
                reason_of(error),
            )
    return str(repository)


def check_app(space_id: str, *, private: bool = False) -> None:
    r"""
    Raises `UserError` if there is a Space of this name, `user/name`, with another app than ours, or a public one where it must be private.
    """
    api, kind = HfApi(), {"repo_type": "space"}
    if not api.repo_exists(space_id, **kind):
        return
    if private and not is_private(space_id, "space"):
        raise UserError(
            f"the Space {space_id} exists and is public, but the model is private. Make the Space private in its settings on the Hub, or "
            "name another one with `--space_id`."
        )
    found = set(api.list_repo_files(space_id, **kind)) - {".gitattributes", "README.md"}
    if not found:
        return
    if "app.py" not in found or _OF_OUR_APP not in Path(api.hf_hub_download(space_id, "app.py", **kind)).read_bytes():
        raise UserError(
            f"the Space {space_id} exists and has another app, which an upload would replace. Name another one with `--space_id`."
        )


def check_space(result: Result) -> None:
    r"""
    Raises `UserError` if the app of a Space cannot draw with a model.

    Args:
        result ([`~dae_diffusers.hub.results.Result`]): The model.
    """
    class_name = result.index.get("_class_name")
    if result.pipeline is not None and class_name not in GENERATORS:
        raise UserError(
            f"`space`: {result.pipeline} is a {class_name}, but the app of the Space draws only with {' and '.join(GENERATORS)}. Push it "
            "without `--space`."
        )
    if not makes_pictures(result):
        raise UserError(
            f"`space`: the images of {result.vae} have {result.vae_config.get('in_channels')} channels, but the app of the Space shows "
            "pictures of 1 or 3. Push it without `--space`."
        )


def space_files(model_id: str) -> dict[str, bytes]:
    r"""The files of the app, by name, with the model's name in the front matter of its README, where the app reads it."""
    found = {
        path.name: path.read_bytes()
        for path in (resources.files("dae_diffusers.hub") / "space").iterdir()
        if path.is_file()
    }
    card = RepoCard(found["README.md"].decode())
    card.data.title = model_id.split("/")[-1]
    card.data.models = [model_id]
    return {**found, "README.md": str(card).encode()}


def push_command(folder: str | Path, repo_id: str, *, private: bool = False, license: str | None = None) -> str:
    r"""The command that repeats an upload."""
    is_stage1 = Path(folder).name == "stage1"
    words = ["dae-diffusers", "push", str(Path(folder).parent if is_stage1 else folder), repo_id]
    words += ["--stage1"] if is_stage1 else []
    words += ["--private"] if private else []
    words += ["--license", license] if license else []
    return shlex.join(words)


def reason_of(error: BaseException) -> str:
    r"""The message of an error and its cause, short enough for a log."""
    cause = "" if error.__cause__ is None else f" {error.__cause__}"
    return f"{type(error).__name__}: {one_line(f'{error}{cause}', 300)}"


class BackgroundUpload:
    r"""
    Uploads snapshots during training, in a thread, one at a time.

    Args:
        folder (`Path`): Folder for a snapshot until it is uploaded.

    Attributes:
        failures (`list[str]`): Errors since the last upload that went well. The first is logged.
        uploaded (`int` or `None`): Step of the last upload that went well.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.failures: list[str] = []
        self.uploaded: int | None = None
        self._thread: threading.Thread | None = None
        self._hides_bars = False

    @property
    def is_running(self) -> bool:
        r"""Whether an upload is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, *, save: Callable[[Path], object], push: Callable[[Path], object]) -> None:
        r"""
        Saves a snapshot and starts its upload. Does nothing while an upload is running: the next snapshot contains everything.

        Args:
            step (`int`): Steps done.
            save: Function that writes the snapshot into a folder; it is called before this returns.
            push: Function that uploads that folder, called in the thread.
        """
        if self.is_running:
            logger.info("step %d is not uploaded: the upload before it is still running.", step)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            save(self.folder)
        except (OSError, SafetensorError, UserError) as error:
            self._note_failure(step, error)
            return

        def run():
            try:
                push(self.folder)
                self.failures, self.uploaded = [], step
            except Exception as error:  # an upload may fail in any way; the run must not
                self._note_failure(step, error)

        if not are_progress_bars_disabled():  # they would run through that of training
            disable_progress_bars()
            self._hides_bars = True
        self._thread = threading.Thread(target=run, name="hub-upload", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        r"""Waits until the running upload has ended."""
        if self._thread is not None:
            self._thread.join()
        if self._hides_bars:
            enable_progress_bars()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note_failure(self, step: int, error: Exception) -> None:
        self.failures.append(f"step {step}: {reason_of(error)}")
        if len(self.failures) == 1:
            logger.warning(
                "an upload while training failed (%s). Training goes on; the next checkpoint tries again.",
                self.failures[0],
            )


def half_precision_files(files: dict[str, Path | bytes], folder: Path) -> dict[str, Path]:
    r"""
    Half-precision copies of the weights among `files`.

    Args:
        files (`dict`): Path in the repository to file.
        folder (`Path`): Folder for the copies.

    Returns:
        `dict`: Path in the repository, such as `vae/diffusion_pytorch_model.fp16.safetensors`, to file.

    Raises:
        UserError: If the weights are in several files.
    """
    copies = {}
    for name, path in files.items():
        if name.endswith(".safetensors.index.json"):
            raise UserError(
                f"`fp16`: {name} says that the weights are in several files, which is not supported. Save the pipeline "
                'with `pipe.to(torch.float16).save_pretrained(folder, variant="fp16")` beside the others instead.'
            )
        if Path(name).name in _WEIGHTS:
            target = Path(name).with_suffix(".fp16.safetensors").as_posix()
            copies[target] = folder / target.replace("/", "-")
            halved = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
            save_file(halved, copies[target], metadata={"format": "pt"})
    return copies


def is_of_others(card: ModelCard) -> bool:
    r"""Whether a card says something and was not written by this package."""
    return bool(card.text.strip()) and "dae_diffusers" not in card.text


def space_of(card: ModelCard) -> str | None:
    r"""The Space that a card links to as the model's."""
    found = re.search(r"Try it in its Space: \[([\w.-]+/[\w.-]+)\]", card.text)
    return None if found is None else found[1]


@waiting_at_most()
def published_license(repo_id: str, revision: str | None) -> str | None:
    r"""The license in the card on the Hub, so that pushing again without a license keeps it."""
    card = published_card(repo_id, revision)
    return None if card is None else card.data.license


def published_card(repo_id: str, revision: str | None) -> ModelCard | None:
    """The card on the Hub, that of `main` for a branch that does not exist yet; None if there is none."""
    try:
        path = HfApi().hf_hub_download(repo_id, "README.md", revision=revision)
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError:
        return None if revision is None else published_card(repo_id, None)
    return ModelCard.load(path, ignore_metadata_errors=True)


def _commit(
    api,
    repo_id: str,
    files: dict[str, Path | bytes],
    *,
    message: str,
    published: Iterable[str] = (),
    stale: Iterable[str] = (),
    **kwargs,
):
    """Adds files in one commit, and removes `stale` ones and `published` weights that could be mistaken for the new ones."""
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    operations += [
        CommitOperationDelete(path_in_repo=name) for name in dict.fromkeys([*stale, *stale_files(published, files)])
    ]
    return api.create_commit(repo_id, operations, commit_message=message, **kwargs)


def stale_files(published: Iterable[str], files: Iterable[str]) -> list[str]:
    r"""Files of an earlier push or export, in `published`, that must not stand beside those of this one, in `files`."""
    kinds = (stale_weights, stale_parts, stale_pictures, stale_numbers)
    return list(dict.fromkeys(name for kind in kinds for name in kind(published, files)))


def remove_stale_files(folder: Path, files: Iterable[str]) -> list[str]:
    r"""
    Removes what an earlier export has left in a folder: what an upload of `files` would remove from a repository, and a stage 1
    that is not among them. Files whose names no export gives stay.

    Returns:
        `list[str]`: What was removed.
    """
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    stale = [*stale_files(found, files), *(name for name in found if name.startswith("stage1/") and name not in files)]
    stale = [name for name in stale if _EXPORTED.fullmatch(name)]
    for name in stale:
        (folder / name).unlink()
        with suppress(OSError):  # others' files lie there
            (folder / name).parent.rmdir()
    return stale


def stale_weights(published: Iterable[str], files: Iterable[str]) -> list[str]:
    r"""
    Old weights in a repository, beside new ones in `files`: a single file beside new shards, or half-precision
    copies beside sharded weights. `from_pretrained` would load them as if they belonged to this push.
    """
    folders = {name.rpartition("/")[0] for name in files if name.endswith(".safetensors")}
    return [
        name
        for name in published
        if name not in files
        and name.rpartition("/")[0] in folders
        and name.endswith((".safetensors", ".safetensors.index.json"))
    ]


def stale_parts(published: Iterable[str], files: Iterable[str]) -> list[str]:
    r"""Components of another pipeline that was pushed here before, such as the transformer after a push of a prior."""
    if "model_index.json" not in files:
        return []
    folders = {name.partition("/")[0] for name in files if "/" in name}
    return [
        name
        for name in published
        if "/" in name and (folder := name.partition("/")[0]) in _PARTS and folder not in folders
    ]


def stale_pictures(published: Iterable[str], files: Iterable[str]) -> list[str]:
    r"""Pictures that an earlier push has published and this one leaves out: they show images of the data set, or other weights."""
    # Those of a pipeline stay with its card.
    names = PICTURES if "model_index.json" in files else ("reconstructions.png",)
    pictures = [f"images/{name}" for name in names]
    is_result = "metrics.json" in files or any(name.startswith(("vae/", "images/")) for name in files)
    return [name for name in published if is_result and name in pictures and name not in files]


def stale_numbers(published: Iterable[str], files: Iterable[str]) -> list[str]:
    r"""Numbers and settings that an earlier push of a pipeline has published, if there are none of its present weights."""
    return [name for name in published if name in NUMBERS and "model_index.json" in files and name not in files]


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (LocalTokenNotFoundError, HFValidationError)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in (408, 429) or status >= 500
