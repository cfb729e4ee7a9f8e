"""What all commands share: options, one-line errors, text or JSON."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.errors import EXIT_INTERRUPTED, LdmError

JobPath = Annotated[Path, typer.Argument(help="The job file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override a field: stages.0.num_inference_steps=30. May be repeated.", metavar="PATH=VALUE"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first N rows of the table.", metavar="N")]
Extend = Annotated[bool, typer.Option(help="Add changed rows beside those of an older version of the job.")]
Join = Annotated[bool, typer.Option("--join", help="Help a run that is alive on the same output.")]
Takeover = Annotated[bool, typer.Option("--takeover", help="Replace a run that is alive on the same output.")]
Slice = Annotated[
    str | None,
    typer.Option(
        "--slice",
        help="Do only the third eighth of the shards, beside other runs that do theirs.",
        metavar="3/8",
    ),
]


@contextmanager
def one_line_errors(as_json: bool) -> Iterator[None]:
    """A user's mistake is one line and an exit code, never a traceback."""
    try:
        yield
    except LdmError as error:
        fail(str(error), error.exit_code, as_json)
    except (OSError, UnicodeError, RecursionError) as error:
        # What no part of ours foresaw: a folder without permission, a name that is too long or no text.
        what = getattr(error, "filename", None)
        reason = getattr(error, "strerror", None) or type(error).__name__
        fail(f"{what!r}: {reason}" if what else f"{reason}: {str(error)[:200]}", 1, as_json)
    except KeyboardInterrupt:
        # Ray takes seconds to end, and who asks again does not want to wait for it.
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
        fail("interrupted; nothing that was committed is lost, run the same command again", EXIT_INTERRUPTED, as_json)


def fail(message: str, code: int, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    else:
        typer.echo(message, err=True)
    raise typer.Exit(code)


def emit(as_json: bool, value: dict[str, Any], text: Callable[[], str]) -> None:
    typer.echo(json.dumps(value, default=str) if as_json else text())
