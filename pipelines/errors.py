"""Every error that a user may meet, one line each; the exit code belongs to the class.

LdmError
├── JobError            2   the job file, the command or the table is wrong
├── OutputHeldByOther   2   sink.path holds the result of a different job
├── StorageError        1   a store refuses or does not answer
├── RunFailed           1   the run itself could not go on
├── NotWhole            4   the output does not add up
└── RunAlive           75   another run works on the same output
"""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """`text` for a terminal: what steers one, or is no text, as a replacement character; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class LdmError(Exception):
    """Base of all; the message says where, what came, what is allowed and what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        # It quotes what a file, a table or a server said.
        super().__init__(printable(message))


class JobError(LdmError):
    """The job file, the command line or the input table is wrong."""

    exit_code = 2


class OutputHeldByOther(LdmError):
    """The output belongs to a job with other output-changing parameters."""

    exit_code = 2


class StorageError(LdmError):
    """A store refused (credentials, permission, no such bucket) or stayed silent."""


class RunFailed(LdmError):
    """The run stopped for a reason that no single row explains."""


class NotWhole(LdmError):
    """Planned rows and the manifest do not agree."""

    exit_code = 4


class RunAlive(LdmError):
    """A live run holds the output."""

    exit_code = 75


def told_by(traceback: str) -> LdmError | None:
    """The first error of ours in the text of a traceback: all that Ray keeps of what was raised in a task."""
    kinds = {kind.__name__: kind for kind in LdmError.__subclasses__()}
    found = re.search(rf"^{__name__}\.({'|'.join(kinds)}): (.+)$", traceback, re.MULTILINE)
    return None if found is None else kinds[found[1]](found[2])


EXIT_OK, EXIT_DEAD_LETTERS, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 3, 130, 143
