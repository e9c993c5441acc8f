"""What the user can mend is said in one line; everything else keeps its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from tqdm.auto import tqdm

_SHOW = "LOKU_TRACEBACK"


class CommandError(ValueError):
    """A mistake in what the user gave."""


def warn(message: str) -> None:
    """One line beside what the command prints, of what does not stop it."""
    print(f"loku: warning: {message}", file=sys.stderr)


@contextmanager
def blaming(what: str | None = None, *others: type[Exception]) -> Iterator[None]:
    """Around what fails because of the user's files and values: such errors become CommandErrors, after ``what``.

    Wrap what reads and checks, not what computes: bad values of our own making must not pass for the user's.

    Args:
        what: the option or the source at fault; None where the error tells.
        others: errors that stand for bad input here, besides ValueError, OSError and those of safetensors' files.
    """
    try:
        yield
    except CommandError:
        raise
    except (ValueError, OSError, SafetensorError, *others) as error:
        raise CommandError(f"{what}: {error}" if what else str(error)) from error


def run_command(command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Call a command; returns the exit status.

    A CommandError, and an OSError (a full disk, no network, no permission), is one line on standard error and status 1,
    or its traceback where the environment has LOKU_TRACEBACK=1. All others are our mistakes and are not caught.
    """
    try:
        command(argv)
    except (CommandError, OSError) as error:
        if os.environ.get(_SHOW, "0") != "0":
            raise
        # A progress bar that was broken off may still be open: the message takes a line of its own.
        tqdm.write(f"loku: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loku: interrupted", file=sys.stderr)
        return 130
    return 0
