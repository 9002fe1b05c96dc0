"""What a user can mend: raised with one sentence of what was seen, what is allowed, what to do next."""


class UserError(ValueError):
    """A mistake that the user can mend. Scripts print it as one line and exit with 1, or 2 for a wrong argument."""

    exit_code = 1


class ConfigError(UserError):
    """A wrong argument, or arguments that do not go together."""

    exit_code = 2


def one_line(text: object, limit: int | None = None) -> str:
    r"""A text, or what an error says, on one line; at most `limit` characters of it."""
    return " ".join(str(text).split())[:limit]
