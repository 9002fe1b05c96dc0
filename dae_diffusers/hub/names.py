"""Names of repositories on the Hub. Needs no torch."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dae_diffusers.errors import ConfigError, one_line


def check_repo_id(repo_id: str, name: str = "repo_id") -> None:
    r"""
    Checks a repository's name before the Hub is contacted.

    Args:
        repo_id (`str`): `user/name`, or `name` in the account of the token.
        name (`str`, *optional*): Name of the argument, for the message.

    Raises:
        ConfigError: If it is not a repository's name, such as a web address or a path.
    """
    allowed = "but must be `user/name`, or `name` in your account: letters, digits, `-`, `_` and `.`"
    if "://" in repo_id or repo_id.startswith(("huggingface.co/", "hf.co/", "www.")):
        words = repo_id.partition("://")[2] or repo_id
        words = [word for word in words.split("/")[1:3] if word]
        raise ConfigError(
            f"`{name}` is the web address {repo_id}, {allowed}. Pass {'/'.join(words) or 'the name alone'}."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"`{name}` is {repo_id!r}, {allowed}. ({one_line(error)})") from None
