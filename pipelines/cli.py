"""The command line. Heavy imports happen inside the commands, so that --help and check stay quick."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import cli_submit
from pipelines.errors import EXIT_DEAD_LETTERS, JobError
from pipelines.terminal import Extend, JobPath, Join, Json, Limit, Set, Slice, Takeover, emit, fail, one_line_errors
from pipelines.wording import (
    diagnosis_text,
    garbage_text,
    group_text,
    planned_json,
    planned_text,
    report_text,
    summary_text,
    totals_text,
)

if TYPE_CHECKING:
    from pipelines.job import Job

app = typer.Typer(
    name="ldm-batch",
    help="Batch pipeline for latent diffusion models: a YAML job in, images and a Parquet manifest out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[str, typer.Argument(help="A job file, or the output folder or URL itself.", show_default=False)]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster (auto, host:port); one of this machine's own if left out.")
]
Grace = Annotated[
    float | None,
    typer.Option(
        min=0, help="Seconds after Ctrl-C or SIGTERM until what is still in flight is abandoned; no limit if left out."
    ),
]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the job file.")] = Path("job.yaml"),
    as_json: Json = False,
) -> None:
    """Write a commented starter job and a small prompt table beside it."""
    from importlib.resources import files

    with one_line_errors(as_json):
        if path.is_dir():
            path = path / "job.yaml"
        if path.suffix not in (".yaml", ".yml"):
            fail(
                f"{path}: a job file's name ends in .yaml; choose another name: ldm-batch init my-job.yaml", 2, as_json
            )
        table = path.with_suffix(".csv")
        starter = files("pipelines") / "starter"
        job = (starter / "job.yaml").read_text(encoding="utf-8").replace("PROMPTS", json.dumps(str(table)))
        texts = {path: job, table: (starter / "prompts.csv").read_text(encoding="utf-8")}
        for target in texts:
            if target.exists():
                fail(f"{target} exists already; choose another name: ldm-batch init my-job.yaml", 2, as_json)
        for target, text in texts.items():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
            except OSError as error:
                fail(f"{target}: cannot be written ({error.strerror}); choose another folder", 2, as_json)
        quoted = shlex.quote(str(path))
        emit(
            as_json,
            {"job": str(path), "table": str(table)},
            lambda: f"wrote {path} and {table}\nnext:\n  ldm-batch check {quoted}\n  ldm-batch run {quoted}",
        )


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of a job file, for editors. The output is JSON with or without --json."""
    from pipelines.job import json_schema

    typer.echo(json.dumps(json_schema(), indent=None if as_json else 2))


@app.command()
def check(job: JobPath, set_: Set = None, limit: Limit = None, as_json: Json = False) -> None:
    """Validate the job, its model and every row of its table; start nothing, write nothing."""
    with one_line_errors(as_json):
        from pipelines.planner import check as check_job

        planned = check_job(_load(job, set_), limit)
        emit(as_json, planned_json(planned), lambda: f"{job} is fine\n{planned_text(planned)}")


@app.command()
def plan(
    job: JobPath,
    set_: Set = None,
    limit: Limit = None,
    extend: Extend = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Write the plan into the output and show it: rows, duplicates, batches, shards, what is left."""
    with one_line_errors(as_json):
        from functools import partial

        from pipelines.measuring import measured
        from pipelines.planner import plan as plan_job
        from pipelines.storage import Store
        from pipelines.totals import unfinished

        loaded = _load(job, set_)
        store = Store(loaded.sink.path, loaded.sink.storage_options)
        store.probe()
        measure = partial(measured, address=address, say=lambda text: typer.echo(text, err=True))
        planned = plan_job(loaded, limit, extend, measure)
        left = sum(len(unfinished(store, one)) for one in planned.plans)
        # Not repeated word for word: --set may hold a secret.
        alike = "  # with the same options" if set_ or limit or extend or address else ""
        emit(
            as_json,
            planned_json(planned) | {"num_shards_left": left},
            lambda: (
                f"{planned_text(planned)}\n{left} of {planned.num_shards} shards are left to do\n"
                f"next:\n  ldm-batch run {shlex.quote(str(job))}{alike}"
            ),
        )


@app.command()
def run(
    job: JobPath,
    set_: Set = None,
    limit: Limit = None,
    extend: Extend = False,
    join: Join = False,
    takeover: Takeover = False,
    slice_: Slice = None,
    address: Address = None,
    grace: Grace = None,
    dead_letters_ok: Annotated[
        bool,
        typer.Option("--dead-letters-ok", help="Exit with 0 too where rows failed, for what would start it all again."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Do what is left of the job. The same command again resumes; when nothing is left it says so."""
    with one_line_errors(as_json):
        from pipelines.progress import Progress
        from pipelines.runner import run as run_job
        from pipelines.slices import Slice as Part

        part = None if slice_ is None else Part.parse(slice_)
        loaded = _load(job, set_)
        progress = Progress()
        try:
            summary = run_job(loaded, limit, extend, join, takeover, address, progress, grace, part)
        finally:
            progress.done()
        from dataclasses import asdict

        emit(as_json, asdict(summary), lambda: summary_text(job, loaded, summary))
        done = dead_letters_ok and summary.exit_code == EXIT_DEAD_LETTERS
        raise typer.Exit(0 if done else summary.exit_code)


@app.command()
def status(
    output: Annotated[
        str,
        typer.Argument(
            help="A job file, or the output itself; with --address or --kube a job file, or an id.", show_default=False
        ),
    ],
    address: cli_submit.Address = None,
    kube: cli_submit.Kube = False,
    namespace: cli_submit.Namespace = None,
    context: cli_submit.Context = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Say what an output holds, from its files alone; with --address or --kube, what a cluster says of a job."""
    with one_line_errors(as_json):
        if address or kube or namespace or context:
            cli_submit.cluster_status(output, address, kube, namespace, context, set_, as_json)
            return
        from dataclasses import asdict

        from pipelines.totals import status as status_of

        output, options, _ = _output(output, set_)
        totals, runs = status_of(output, options)
        value = asdict(totals) | {"output": output, "num_runs": len(runs), "runs": runs}
        emit(as_json, value, lambda: f"{output}: {totals_text(totals)}\nruns: {len(runs)}")


@app.command()
def verify(
    output: Output,
    deep: Annotated[bool, typer.Option("--deep", help="Read every file, and hash it.")] = False,
    sample: Annotated[int | None, typer.Option(min=1, help="Read the files of N rows.", metavar="N")] = None,
    decode: Annotated[int, typer.Option(min=0, help="Of latents: decode N rows too.", metavar="N")] = 0,
    regenerate: Annotated[
        int, typer.Option(min=0, help="Make N rows again, and compare their bytes.", metavar="N")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Which rows those are.")] = 0,
    as_json: Json = False,
) -> None:
    """Read an output back: is every part whole, every file there, and its content what the manifest says?"""
    with one_line_errors(as_json):
        from dataclasses import asdict

        from pipelines.verify import verify as verify_output

        output, options, source_options = _output(output)
        report = verify_output(output, options, deep, sample, decode, regenerate, seed, source_options)
        value = {"whole": not report.num_faults, **asdict(report), "exit_code": report.exit_code}
        del value["damage"]
        if not as_json:
            for fault in report.faults:
                typer.echo(fault, err=True)
            if report.num_faults > len(report.faults):
                typer.echo(f"… {report.num_faults} faults in all", err=True)
        emit(as_json, value, lambda: report_text(report))
        raise typer.Exit(report.exit_code)


@app.command()
def errors(
    output: Output,
    csv: Annotated[Path | None, typer.Option(help="Write all of them as a table.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Show the rows that failed, by stage and error type."""
    with one_line_errors(as_json):
        from dataclasses import asdict

        from pipelines.dead_letters import groups, write_csv

        output, options, _ = _output(output)
        found = groups(output, options)
        code = EXIT_DEAD_LETTERS if found else 0
        if csv is not None:
            write_csv(output, csv, options)
        emit(
            as_json,
            {
                "output": output,
                "num_failed": sum(group.num_rows for group in found),
                "groups": [asdict(group) for group in found],
                "exit_code": code,
            },
            lambda: "\n".join(map(group_text, found)) if found else f"{output}: no row failed",
        )
        raise typer.Exit(code)


@app.command()
def retry(
    job: JobPath,
    error_type: Annotated[
        list[str] | None, typer.Option(help="Only rows that failed so. May be repeated.", metavar="TYPE")
    ] = None,
    set_: Set = None,
    address: Address = None,
    grace: Grace = None,
    as_json: Json = False,
) -> None:
    """Try the failed rows again, under the plan that they were planned by."""
    with one_line_errors(as_json):
        from pipelines.dead_letters import Retry

        choose = Retry(error_type or ())
        _redo(job, set_, address, grace, as_json, choose, lambda: choose.num_hopeless)


@app.command()
def repair(job: JobPath, set_: Set = None, address: Address = None, grace: Grace = None, as_json: Json = False) -> None:
    """Read everything back as `verify --deep` does, and make again what is missing or damaged."""
    with one_line_errors(as_json):
        from pipelines.verify import damage

        _redo(job, set_, address, grace, as_json, lambda store, plans: damage(store), lambda: 0)


@app.command()
def doctor(
    url: Annotated[
        str | None,
        typer.Argument(
            help="A folder or URL to write to, or a job file; with --kube a job file, or nothing.", show_default=False
        ),
    ] = None,
    kube: Annotated[
        bool, typer.Option("--kube", help="Look at a Kubernetes cluster instead: can it run the job?")
    ] = False,
    namespace: cli_submit.Namespace = None,
    context: cli_submit.Context = None,
    as_json: Json = False,
) -> None:
    """Probe a store: what it holds to, how quick it is, and how a run will fare on it; or a cluster with --kube."""
    with one_line_errors(as_json):
        from dataclasses import asdict

        if kube:
            from pipelines.kube_checks import diagnose

            found = diagnose(namespace, context, None if url is None else _load(Path(url), None))
        else:
            from pipelines.doctor import doctor as probe

            place, options, _ = _output(url or "")
            found = probe(place, options)
        emit(as_json, asdict(found) | {"exit_code": found.exit_code}, lambda: diagnosis_text(found))
        raise typer.Exit(found.exit_code)


def _redo(
    job: Path,
    overrides: list[str] | None,
    address: str | None,
    grace_s: float | None,
    as_json: bool,
    choose: Any,
    hopeless: Callable[[], int],
) -> None:
    from dataclasses import asdict

    from pipelines.progress import Progress
    from pipelines.runner import redo

    loaded = _load(job, overrides)
    progress = Progress()
    try:
        summary = redo(loaded, choose, address, progress, grace_s)
    finally:
        progress.done()
    value = asdict(summary) | {"num_wrong": hopeless()}
    emit(as_json, value, lambda: summary_text(job, loaded, summary) + _hopeless(hopeless()))
    raise typer.Exit(summary.exit_code)


def _hopeless(num_rows: int) -> str:
    return f"\n{num_rows} rows are wrong in the table; mend them there, and run the job again" if num_rows else ""


@app.command()
def gc(
    output: Output,
    older_than: Annotated[
        str, typer.Option(help="Leave alone what was written since: 24h, 90m, 7d.", metavar="AGE")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; delete nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Delete files that no part names: what attempts left that died, or that came second."""
    with one_line_errors(as_json):
        from dataclasses import asdict

        from pipelines.gc import gc as collect_garbage

        age_s = _seconds(older_than)
        output, options, _ = _output(output)
        garbage = collect_garbage(output, options, age_s, dry_run)
        emit(as_json, asdict(garbage) | {"older_than_s": age_s}, lambda: garbage_text(garbage, older_than))


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([mhd])", age)
    seconds = int(match[1]) * {"m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]] if match else 0.0
    if seconds < 3600:
        raise JobError(f"--older-than {age}: give minutes, hours or days, one hour at least: 90m, 24h, 7d")
    return seconds


def _output(path: str, overrides: list[str] | None = None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The output that a command names, and the storage options of it and of the source, which only a job file has."""
    if not path.endswith((".yaml", ".yml")):
        if not path.strip():
            raise JobError("no output is named; give a job file, or the output folder or URL itself")
        from pipelines.job import problem_of

        if (problem := problem_of(path, is_sink=False)) is not None:
            raise JobError(problem)
        return path, {}, {}
    loaded = _load(Path(path), overrides)
    return loaded.sink.path, loaded.sink.storage_options, loaded.source.storage_options


cli_submit.add_to(app)


def _load(path: Path, overrides: list[str] | None) -> Job:
    from pipelines.job import load_job

    return load_job(path, overrides or ())


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
