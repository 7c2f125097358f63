"""What cannot be softened, by name and line."""

from __future__ import annotations

import sys

# code objects that the transformation made: the innermost of them in a stack is where the program stands
GENERATED: set[object] = set()


class SoftenError(ValueError):
    """A program, or a step of one, that has no soft meaning; the message names file, line and reason.

    Example:
        >>> @so.soften
        ... def sign(x):
        ...     return "plus" if x > 0 else "minus"
        >>> sign(torch.tensor(0.0))
        Traceback (most recent call last):
        ...
        smoothops.soften.errors.SoftenError: <softened sign> returns values that have no mean: ...
    """


def refused(filename: str, line: int, reason: str) -> SoftenError:
    return SoftenError(f"{filename}:{line}: {reason}")


def here() -> tuple[str, int]:
    """File and line of the user's program that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code not in GENERATED:
        frame = frame.f_back
    # a lambda or comprehension of the program has the file of the program
    return frame.f_code.co_filename, frame.f_lineno


def cannot(reason: str) -> SoftenError:
    """The error for the line that is being run."""
    return refused(*here(), reason)
