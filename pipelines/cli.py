"""The command line. Heavy imports happen inside the commands, so that --help and check stay quick."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.errors import EXIT_INTERRUPTED, LdmError

if TYPE_CHECKING:
    from pipelines.job import Job
    from pipelines.planner import Planned
    from pipelines.runner import Summary
    from pipelines.totals import Totals
    from pipelines.verify import Report

app = typer.Typer(
    name="ldm-batch",
    help="Batch pipeline for latent diffusion models: a YAML job in, images and a Parquet manifest out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


@contextmanager
def one_line_errors(as_json: bool) -> Iterator[None]:
    """A user's mistake is one line and an exit code, never a traceback."""
    try:
        yield
    except LdmError as error:
        _fail(str(error), error.exit_code, as_json)
    except (OSError, UnicodeError, RecursionError) as error:
        # What no part of ours foresaw: a folder without permission, a name that is too long or no text.
        what = getattr(error, "filename", None)
        reason = getattr(error, "strerror", None) or type(error).__name__
        _fail(f"{what!r}: {reason}" if what else f"{reason}: {str(error)[:200]}", 1, as_json)
    except KeyboardInterrupt:
        _fail("interrupted; nothing that was committed is lost, run the same command again", EXIT_INTERRUPTED, as_json)


def _fail(message: str, code: int, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    else:
        typer.echo(message, err=True)
    raise typer.Exit(code)


def _emit(as_json: bool, value: dict[str, Any], text: Callable[[], str]) -> None:
    typer.echo(json.dumps(value, default=str) if as_json else text())


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
            _fail(
                f"{path}: a job file's name ends in .yaml; choose another name: ldm-batch init my-job.yaml", 2, as_json
            )
        table = path.with_suffix(".csv")
        starter = files("pipelines") / "starter"
        job = (starter / "job.yaml").read_text(encoding="utf-8").replace("PROMPTS", json.dumps(str(table)))
        texts = {path: job, table: (starter / "prompts.csv").read_text(encoding="utf-8")}
        for target in texts:
            if target.exists():
                _fail(f"{target} exists already; choose another name: ldm-batch init my-job.yaml", 2, as_json)
        for target, text in texts.items():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
            except OSError as error:
                _fail(f"{target}: cannot be written ({error.strerror}); choose another folder", 2, as_json)
        quoted = shlex.quote(str(path))
        _emit(
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
        _emit(as_json, _planned_json(planned), lambda: f"{job} is fine\n{_planned_text(planned)}")


@app.command()
def plan(job: JobPath, set_: Set = None, limit: Limit = None, extend: Extend = False, as_json: Json = False) -> None:
    """Write the plan into the output and show it: rows, duplicates, batches, shards, what is left."""
    with one_line_errors(as_json):
        from pipelines.planner import plan as plan_job
        from pipelines.storage import Store
        from pipelines.totals import unfinished

        loaded = _load(job, set_)
        store = Store(loaded.sink.path, loaded.sink.storage_options)
        store.probe()
        planned = plan_job(loaded, limit, extend)
        left = sum(len(unfinished(store, one)) for one in planned.plans)
        _emit(
            as_json,
            _planned_json(planned) | {"num_shards_left": left},
            lambda: (
                f"{_planned_text(planned)}\n{left} of {planned.num_shards} shards are left to do\n"
                f"next:\n  ldm-batch run {shlex.quote(str(job))}"
            ),
        )


@app.command()
def run(
    job: JobPath,
    set_: Set = None,
    limit: Limit = None,
    extend: Extend = False,
    join: Annotated[bool, typer.Option("--join", help="Help a run that is alive on the same output.")] = False,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Replace a run that is alive on the same output.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster (auto, host:port); one of this machine's own if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Do what is left of the job. The same command again resumes; when nothing is left it says so."""
    with one_line_errors(as_json):
        from pipelines.progress import Progress
        from pipelines.runner import run as run_job

        loaded = _load(job, set_)
        progress = Progress()
        try:
            summary = run_job(loaded, limit, extend, join, takeover, address, progress)
        finally:
            progress.done()
        from dataclasses import asdict

        _emit(as_json, asdict(summary), lambda: _summary_text(job, loaded, summary))
        raise typer.Exit(summary.exit_code)


@app.command()
def status(
    output: Annotated[str, typer.Argument(help="A job file, or the output folder or URL itself.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Say what an output holds, from its files alone; also while a run goes on."""
    with one_line_errors(as_json):
        from dataclasses import asdict

        from pipelines.totals import status as status_of

        output, options, _ = _output(output)
        totals, runs = status_of(output, options)
        value = asdict(totals) | {"output": output, "num_runs": len(runs), "runs": runs}
        _emit(as_json, value, lambda: f"{output}: {_totals_text(totals)}\nruns: {len(runs)}")


@app.command()
def verify(
    output: Annotated[str, typer.Argument(help="A job file, or the output folder or URL itself.", show_default=False)],
    sample: Annotated[int | None, typer.Option(min=1, help="Read the files of N rows only.", metavar="N")] = None,
    decode: Annotated[int, typer.Option(min=0, help="Of latents: decode N rows too.", metavar="N")] = 0,
    seed: Annotated[int, typer.Option(help="Which rows those are.")] = 0,
    as_json: Json = False,
) -> None:
    """Read an output back: is every part whole, every file there, and its content what the manifest says?"""
    with one_line_errors(as_json):
        from dataclasses import asdict

        from pipelines.verify import verify as verify_output

        output, options, source_options = _output(output)
        report = verify_output(output, options, sample, decode, seed, source_options)
        value = {"whole": not report.num_faults, **asdict(report), "exit_code": report.exit_code}
        if not as_json:
            for fault in report.faults:
                typer.echo(fault, err=True)
            if report.num_faults > len(report.faults):
                typer.echo(f"… {report.num_faults} faults in all", err=True)
        _emit(as_json, value, lambda: _report_text(report))
        raise typer.Exit(report.exit_code)


def _output(path: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The output that a command names, and the storage options of it and of the source, which only a job file has."""
    if not path.endswith((".yaml", ".yml")):
        return path, {}, {}
    loaded = _load(Path(path), None)
    return loaded.sink.path, loaded.sink.storage_options, loaded.source.storage_options


def _load(path: Path, overrides: list[str] | None) -> Job:
    from pipelines.job import load_job

    return load_job(path, overrides or ())


def _planned_json(planned: Planned) -> dict[str, Any]:
    return {
        "plan_id": planned.plans[-1].plan_id if planned.plans else None,
        "num_source_rows": planned.num_source_rows,
        "num_rows": planned.num_rows,
        "num_duplicates": planned.num_duplicates,
        "num_known": planned.num_known,
        "num_wrong": planned.num_wrong,
        "num_gone": planned.num_gone,
        "num_skipped": planned.num_skipped,
        "num_batches": planned.new.num_batches if planned.new else 0,
        "num_shards": planned.num_shards,
        "models": [
            {"model": weights.name, "model_revision": weights.revision, "pipeline": facts.pipeline}
            for weights, facts in planned.models
        ],
        "adapters": [
            {"stage": i, "kind": kind, "name": name, "revision": revision}
            for i, beside in enumerate(planned.adapters)
            for kind, name, revision in beside.listed()
        ],
        "buckets": planned.buckets,
        "problems": planned.problems,
    }


def _planned_text(planned: Planned) -> str:
    lines = [
        *(f"model      {weights.name} @ {weights.revision} ({facts.pipeline})" for weights, facts in planned.models),
        *(
            f"           {kind} {name} @ {revision}"
            for beside in planned.adapters
            for kind, name, revision in beside.listed()
        ),
        f"rows       {planned.num_source_rows}",
        f"pictures   {planned.num_rows} ({planned.num_duplicates} duplicates made once, "
        f"{planned.num_known} planned before)",
    ]
    if planned.num_gone:
        lines.append(f"not here   {planned.num_gone} planned before and not in this table; they stay in the output")
    if planned.num_skipped:
        lines.append(f"skipped    {planned.num_skipped} that img2dataset could not download")
    if planned.num_wrong:
        lines.append(f"wrong      {planned.num_wrong}, such as {planned.problems[0]}")
    if planned.new:
        lines.append(
            f"batches    {planned.new.num_batches} of {planned.new.batch_size}, in {len(planned.new.shards)} shards"
        )
        lines.append("           rows  batches  size         steps  guidance  strength  scheduler")
        lines += [_bucket_text(bucket) for bucket in planned.buckets[:12]]
        if len(planned.buckets) > 12:
            lines.append(f"           … and {len(planned.buckets) - 12} other combinations")
    return "\n".join(lines)


def _lora_text(bucket: dict[str, Any]) -> str:
    if bucket["lora"] is None:
        return ""
    names = " + ".join(Path(part).name for part in bucket["lora"].split(" + "))
    return f"  {names}" + ("" if bucket["lora_scale"] == 1 else f" × {bucket['lora_scale']:g}")


def _bucket_text(bucket: dict[str, Any]) -> str:
    width, height = bucket["width"], bucket["height"]
    size = f"{width or '?'}×{height or '?'}" if width or height else "as it is"
    steps, guidance, strength = (
        "" if bucket[name] is None else f"{bucket[name]:g}"
        for name in ("num_inference_steps", "guidance_scale", "strength")
    )
    return (
        f"         {bucket['rows']:>6}  {bucket['batches']:>7}  {size:<10} {steps:>6}  {guidance:>8}  {strength:>8}  "
        f"{bucket['scheduler'] or ''}{_lora_text(bucket)}"
    ).rstrip()


def _totals_text(totals: Totals) -> str:
    parts = [f"{totals.num_ok} ok", f"{totals.num_failed} failed", f"{totals.num_filtered} filtered"]
    text = (
        f"{', '.join(parts)} of {totals.num_planned} planned; {totals.num_shards_done} of {totals.num_shards} shards, "
        f"{totals.num_bytes / 1e6:.1f} MB"
    )
    if totals.failures:
        text += "\nfailures: " + ", ".join(f"{kind} × {n}" for kind, n in sorted(totals.failures.items()))
    return text


def _report_text(report: Report) -> str:
    verdict = "not whole" if report.num_faults else "whole"
    read = f"read {report.num_files_read} files for {report.num_rows_read} rows, {report.num_bytes_read / 1e6:.1f} MB"
    lines = [f"{report.output}: {verdict}", _totals_text(report.totals), read]
    found = report.decoded
    if found is not None:
        lines.append(f"decoded {found.num_rows} rows, {found.num_compared} of them compared with their images")
    if found is not None and found.num_compared:
        lines.append(f"PSNR {found.psnr_db_mean:.1f} dB, the least {found.psnr_db_min:.1f} dB")
    return "\n".join(lines)


def _summary_text(path: Path, job: Job, summary: Summary) -> str:
    totals, out = summary.totals, summary.output
    lines = []
    if summary.num_new_rows:
        lines.append(f"{summary.num_new_rows} pictures in {summary.duration_s:.1f} s ({summary.rows_per_s:.2f} rows/s)")
    lines.append(f"{out}: {_totals_text(totals)}")
    if summary.num_gone:
        lines.append(f"{summary.num_gone} of them were planned before and are not in this table; they stay")
    if summary.first_error:
        lines.append(f"first failure: {summary.first_error}")
    if summary.exit_code in (0, 3):
        if not summary.num_new_rows:
            lines.append("nothing was left to do")
        show = f"import pipelines; print(pipelines.read_manifest({out!r}))"
        lines += ["next:", f"  ldm-batch status {shlex.quote(out)}"]
        if "://" not in out:
            folder = "images" if job.layout == "files" else "data"
            lines.append(f"  ls {shlex.quote(f'{out}/{folder}')}")
        lines.append(f"  python -c {shlex.quote(show)}")
    else:
        lines += ["stopped; to do the rest:", f"  ldm-batch run {shlex.quote(str(path))}"]
    return "\n".join(lines)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
