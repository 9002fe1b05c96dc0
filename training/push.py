"""
Publish a trained model on the Hugging Face Hub: weights, code, model card, pictures, metrics, and optionally a Space.

    python training/push.py runs/digits user/digits --license cc-by-4.0
    python training/push.py runs/digits user/digits --license cc-by-4.0 --private --fp16 --space
    python training/push.py runs/digits user/digits --export_dir look-first

The first argument is the output folder of a training run, or a pipeline's folder. The second is the repository. First log in with
`hf auth login`.
"""

import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard

from dae_diffusers.cli import parse_config
from dae_diffusers.errors import UserError
from dae_diffusers.hub import card, results, upload
from dae_diffusers.script import run_script, show_messages
from dae_diffusers.training.settings import PushConfig, with_flags

logger = logging.getLogger(__name__)

EXAMPLE = "the caption or conditions of an image, as an example"


def main(config: PushConfig) -> None:
    show_messages()
    if config.stage1 and config.export_dir is None and results.is_stage1_alone(config.folder):
        push_stage1_alone(config)
        return
    result = results.read_result(config.folder)  # what is wrong with the folder is said before the Hub is asked
    if config.space:
        upload.check_space(result)
    if config.export_dir is not None:
        export(config, result)
        return
    stage1 = upload.stage1_files(result.folder) if config.stage1 else {}
    access = {"private": config.private, "license": config.license, "create_pr": config.create_pr}
    repo_id = upload.check_hub_access(config.repo_id, **access)
    try:
        license = config.license or upload.published_license(repo_id, config.revision) or ask_for_license()
        if license is None and not config.keep_card:
            logger.warning(
                "no license is given, and without one nobody may use the weights. Name one with `--license`."
            )
        with_pictures = choose_data_pictures(config, result)
        is_private = upload.is_private(repo_id)
        announce(result, repo_id, with_pictures, is_private=is_private)
        space_id = config.full_space_id(repo_id)
        if space_id is not None:  # before the model is pushed, whose card names its Space
            upload.check_app(space_id, private=config.private or is_private)
        address = upload.push_folder(
            config.folder,
            repo_id,
            private=config.private,
            license=license,
            revision=config.revision,
            create_pr=config.create_pr,
            fp16=config.fp16,
            keep_card=config.keep_card,
            space_id=space_id,
            data_pictures=with_pictures,
        )
        logger.info("pushed to %s", address)
        if stage1:
            logger.info("stage 1: %s", upload.push_stage1(result.folder, repo_id, private=config.private))
        if config.space:
            address = upload.push_space(space_id, repo_id, private=config.private)
            logger.info("Space: %s", address)
            if is_private:
                logger.info("the model is private: give the Space a secret HF_TOKEN that may read it, in its settings.")
    except UserError:
        raise
    except Exception as error:  # a connection may fail in any way
        raise failed_upload(repo_id, error) from None


def push_stage1_alone(config: PushConfig) -> None:
    """Uploads the stage 1 of a run that has trained nothing else."""
    if config.space:
        raise UserError(
            f"`space`: {config.folder} holds only a stage 1, which has no final decoder. Push it without `--space`."
        )
    repo_id = upload.check_hub_access(config.repo_id, private=config.private, license=config.license)
    try:
        logger.info("stage 1: %s", upload.push_stage1(config.folder, repo_id, private=config.private))
    except UserError:
        raise
    except Exception as error:  # a connection may fail in any way
        raise failed_upload(repo_id, error) from None


def failed_upload(repo_id: str, error: Exception) -> UserError:
    return UserError(
        f"the upload to {repo_id} failed ({upload.reason_of(error)}). Nothing is lost; give the same command again to upload what is "
        "missing."
    )


def ask_for_license() -> str | None:
    """Asks for a license, if there is a terminal; else None."""
    if not sys.stdin.isatty():
        return None
    print("License of these weights, such as cc-by-4.0, mit, other (https://hf.co/docs/hub/repositories-licenses);")
    license = input("empty for none: ").strip() or None
    if license is not None:
        upload.check_license(license)
    return license


def choose_data_pictures(config: PushConfig, result: results.Result) -> bool:
    """Whether to publish images and captions of the data set: as the flags say; yes for a public data set; else as the user answers."""
    if config.data_pictures or config.no_data_pictures:
        return config.data_pictures
    if upload.shows_public_images(result):
        return True
    shown = [f"{name} ({result.pictures[name][1]})" for name in card.pictures_of_data(result)]
    shown += [EXAMPLE] if card.has_example(result) else []
    if not shown or config.export_dir is not None or not sys.stdin.isatty():
        return False
    print(f"These show your data set: {'; '.join(shown)}.")
    return input("Publish them too? [y/N] ").strip().lower() in ("y", "yes")


def announce(result: results.Result, repo_id: str, data_pictures: bool, *, is_private: bool) -> None:
    """Logs what others will see after the upload."""
    seen = "everybody with access to the repository" if is_private else "everybody"
    pictures = card.published_pictures(result, data_pictures)
    logger.info(
        "%s will show %s: weights, code, settings, numbers%s.",
        repo_id,
        seen,
        f" and the pictures {', '.join(pictures)}" if pictures else "",
    )
    left_out = [name for name in result.pictures if name not in pictures]
    left_out += [EXAMPLE] if card.has_example(result) and not data_pictures else []
    if left_out:
        logger.info(
            "left out because they show your data set: %s. `--data_pictures` publishes them.",
            ", ".join(left_out),
        )


def export(config: PushConfig, result: results.Result) -> None:
    """Writes the files that would be uploaded into a folder."""
    folder = Path(config.export_dir)
    target = folder.resolve()
    models = [result.folder / name for name in ("pipeline", "vae", "stage1")] + [result.pipeline, result.vae]
    models = [model.resolve() for model in models if model is not None]
    if target == result.folder.resolve() or any(model in (target, *target.parents) for model in models):
        raise UserError(f"`export_dir` is {folder}, which contains the result itself. Choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`export_dir` is {folder}, which is a file. Choose a folder.")
    found = card.repository_files(
        result,
        config.repo_id,
        license=config.license,
        card=not config.keep_card,
        space_id=config.full_space_id(config.repo_id),
        data_pictures=choose_data_pictures(config, result),
        fp16=config.fp16,
    )
    if result.doubts:
        logger.warning("%s", " ".join(result.doubts))
    with tempfile.TemporaryDirectory() as temporary:
        if config.fp16:
            found.update(upload.half_precision_files(found, Path(temporary)))
        if config.stage1:
            found.update(upload.stage1_files(result.folder))
        if config.space:
            found.update({f"space/{name}": content for name, content in upload.space_files(config.repo_id).items()})
        if not config.keep_card:
            check_no_others_files(folder, found)
        removed = upload.remove_stale_files(folder, found) if folder.exists() else []
        for name, content in found.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, path)
    logger.info("%d files in %s", len(found), folder)
    if removed:
        logger.info("removed %d files of an earlier export, such as %s", len(removed), removed[0])


def check_no_others_files(folder: Path, names: Iterable[str]) -> None:
    """Raises `UserError` if one of the files exists and no card of ours says that an export has written it."""
    path = folder / "README.md"
    found = sorted(name for name in names if (folder / name).exists())
    if found and (not path.is_file() or upload.is_of_others(ModelCard.load(path, ignore_metadata_errors=True))):
        raise UserError(
            f"`export_dir` {folder} holds {found[0]}, which no export has written and this one would replace. Choose another folder, or "
            "move the file. `--keep_card` leaves a README.md of yours as it is."
        )


if __name__ == "__main__":
    run_script(main, parse_config(PushConfig, with_flags("push", sys.argv[1:]), description=__doc__))
