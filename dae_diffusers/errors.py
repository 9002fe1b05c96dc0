"""Errors that a user can fix, and words for their messages, which say what was seen, what is allowed, and what to do next."""

import difflib
import errno
import os

REMOVED = "the output folder {} was removed while the script ran. Run the command again."
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_WRITE = (*_DISK_IS_FULL, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOTDIR)


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print it as one line and exit with 1, or 2 for a wrong argument."""

    exit_code = 1


class ConfigError(UserError):
    """A wrong argument, or arguments that do not go together."""

    exit_code = 2


def one_line(text: object, limit: int | None = None) -> str:
    r"""Puts a text or the message of an error on one line of at most `limit` characters."""
    return " ".join(str(text).split())[:limit]


def in_full(path: str | os.PathLike) -> str:
    r"""For the end of a message about a path: where a relative one was looked for; empty for an absolute one."""
    return "" if os.path.isabs(path) else f" (looked for {os.path.abspath(path)})"


def did_you_mean(word: str, known: list[str]) -> str:
    r"""`" Did you mean `x`?"`, or the empty string when nothing known resembles `word`."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def storage_problem(error: Exception) -> str | None:
    r"""The reason if the disk kept a file from being written, else None. safetensors and torch wrap the system's error."""
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")
    for number in _DISK_IS_FULL:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    if isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("PytorchStreamWriter", "unexpected pos")
    ):
        return "a file could not be written whole; the disk is probably full"
    return None
