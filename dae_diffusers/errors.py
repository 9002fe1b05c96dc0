"""Errors that a user can fix. Their messages say what was seen, what is allowed, and what to do next."""


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print it as one line and exit with 1, or 2 for a wrong argument."""

    exit_code = 1


class ConfigError(UserError):
    """A wrong argument, or arguments that do not go together."""

    exit_code = 2


def one_line(text: object, limit: int | None = None) -> str:
    r"""Puts a text or the message of an error on one line of at most `limit` characters."""
    return " ".join(str(text).split())[:limit]
