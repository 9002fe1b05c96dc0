"""Errors that a user can fix. Their messages say what was seen, what is allowed, and what to do next."""

import os


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
