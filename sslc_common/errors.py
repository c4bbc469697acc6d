"""Errors that a user can mend, as types of their own, so that a command never shows a traceback for them.

Everything else that escapes is a bug of this project and keeps its traceback.
"""

from __future__ import annotations

# Exit codes of every command.
PASSED = 0
REGRESSION = 1
BAD_INPUT = 2
MISSING = 3
INCONCLUSIVE = 4


class UserError(Exception):
    """A fact that the user can change, told in one shape: fact; what was got; what is allowed; what to do.

    Args:
        fact: What is wrong, naming the file, layer or option. A whole sentence.
        got: What was found.
        allowed: What would have been accepted.
        do: The next step to take.
    """

    exit_code = BAD_INPUT

    def __init__(self, fact: str, *, got: object = None, allowed: str | None = None, do: str | None = None) -> None:
        self.fact, self.got, self.allowed, self.do = fact, got, allowed, do
        parts = [fact.rstrip(".") + "."]
        if got is not None:
            parts.append(f"Got: {str(got).rstrip('.')}.")
        if allowed is not None:
            parts.append(f"Allowed: {allowed.rstrip('.')}.")
        if do is not None:
            parts.append(do.rstrip(".") + ".")
        super().__init__(" ".join(parts))


class InputError(UserError):
    """Bad input or usage: a file, a number, a text that cannot be used. Exit code 2."""


class MissingError(UserError):
    """A backend, library or device is not here. Exit code 3."""

    exit_code = MISSING
