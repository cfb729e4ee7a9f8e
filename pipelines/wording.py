"""What the commands print: plans, summaries and reports in a few lines each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import printable

if TYPE_CHECKING:
    from pipelines.dead_letters import Group
    from pipelines.doctor import Diagnosis
    from pipelines.gc import Garbage
    from pipelines.job import Job
    from pipelines.planner import Planned
    from pipelines.plans import Plan
    from pipelines.runner import Summary
    from pipelines.totals import Totals
    from pipelines.verify import Report


def planned_json(planned: Planned) -> dict[str, Any]:
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


def planned_text(planned: Planned) -> str:
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
            f"batches    {planned.new.num_batches} of {_size_text(planned.new)}, in {len(planned.new.shards)} shards"
        )
        lines.append("           rows  batches  size         steps  guidance  strength  scheduler")
        lines += [_bucket_text(bucket) for bucket in planned.buckets[:12]]
        if len(planned.buckets) > 12:
            lines.append(f"           … and {len(planned.buckets) - 12} other combinations")
    return "\n".join(lines)


def _size_text(plan: Plan) -> str:
    size = plan.job["stages"][0]["batch_size"]
    if size == "auto":
        return f"{plan.batch_size} or what batch_size: auto finds"
    return f"up to {plan.batch_size}" if isinstance(size, dict) else str(plan.batch_size)


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


def totals_text(totals: Totals) -> str:
    parts = [f"{totals.num_ok} ok", f"{totals.num_failed} failed", f"{totals.num_filtered} filtered"]
    text = (
        f"{', '.join(parts)} of {totals.num_planned} planned; {totals.num_shards_done} of {totals.num_shards} shards, "
        f"{totals.num_bytes / 1e6:.1f} MB"
    )
    if totals.failures:
        text += "\nfailures: " + ", ".join(f"{kind} × {n}" for kind, n in sorted(totals.failures.items()))
    return text


def report_text(report: Report) -> str:
    verdict = "not whole" if report.num_faults else "whole"
    read = f"read {report.num_files_read} files for {report.num_rows_read} rows, {report.num_bytes_read / 1e6:.1f} MB"
    lines = [f"{report.output}: {verdict}", totals_text(report.totals), read]
    if report.num_files_seen:
        lines[-1:] = [f"found {report.num_files_seen} files by listing; --deep reads them"] + (
            [read] if report.num_files_read else []
        )
    found = report.decoded
    if found is not None:
        lines.append(f"decoded {found.num_rows} rows, {found.num_compared} of them compared with their images")
    if found is not None and found.num_compared:
        lines.append(f"PSNR {found.psnr_db_mean:.1f} dB, the least {found.psnr_db_min:.1f} dB")
    made = report.regenerated
    if made is not None:
        lines.append(f"made {made.num_rows} rows again, {made.num_same} of them with the same bytes")
    if report.num_faults:
        lines.append("`ldm-batch repair JOB.yaml` makes what is missing or damaged, also what is not done yet")
    return "\n".join(lines)


def diagnosis_text(found: Diagnosis) -> str:
    """A line per probe, and how a run will fare."""
    lines = [f"{f.verdict:<8}{f.name}: {f.text}" for f in found.findings]
    return "\n".join([*lines, f"{found.url}: {found.mode}"])


def group_text(group: Group) -> str:
    """`12 × model.nan in txt2img`, and its examples, a line each."""
    lines = [f"{group.num_rows} × {group.error_type} in {group.stage or 'no stage'}"]
    for row in group.examples:
        where = f"{row['source_uri']} row {row['source_row']}" if row["source_uri"] else f"key {row['key']}"
        named = f" (id {row['id']})" if row["id"] is not None else ""
        lines.append(f"  {where}{named}: {row['error_message']}")
    if group.num_rows > len(group.examples):
        lines.append(f"  … and {group.num_rows - len(group.examples)} more")
    # Ids and names of files are a stranger's.
    return printable("\n".join(lines))


def garbage_text(garbage: Garbage, older_than: str) -> str:
    verb = "would delete" if garbage.dry_run else "deleted"
    lines = [
        f"{garbage.output}: {verb} {garbage.num_deleted} file{'s' * (garbage.num_deleted != 1)} that no part names, "
        f"{garbage.num_bytes_deleted / 1e6:.1f} MB"
    ]
    if garbage.num_uploads:
        lines.append(
            f"{'would give' if garbage.dry_run else 'gave'} up {garbage.num_uploads} "
            f"upload{'s' * (garbage.num_uploads != 1)} that never ended, {garbage.num_bytes_uploads / 1e6:.1f} MB"
        )
    if garbage.num_young:
        lines.append(f"left {garbage.num_young} younger than {older_than}, {garbage.num_bytes_young / 1e6:.1f} MB")
    if garbage.num_not_done:
        lines.append(
            f"left {garbage.num_not_done} of shards that are not done, {garbage.num_bytes_not_done / 1e6:.1f} MB; "
            "run the job to its end first"
        )
    return "\n".join(lines)


def summary_text(path: Path, job: Job, summary: Summary) -> str:
    totals, out = summary.totals, summary.output
    lines = []
    if summary.num_new_rows:
        lines.append(f"{summary.num_new_rows} pictures in {summary.duration_s:.1f} s ({summary.rows_per_s:.2f} rows/s)")
    lines.append(f"{out}: {totals_text(totals)}")
    if summary.slice:
        lines.append(f"these are the shards of slice {summary.slice}; the last slice counts the whole")
    if summary.num_gone:
        lines.append(f"{summary.num_gone} of them were planned before and are not in this table; they stay")
    if summary.first_error:
        lines.append(f"first failure: {summary.first_error}")
    if summary.exit_code in (0, 3):
        if not summary.num_new_rows:
            lines.append("nothing was left to do")
        show = f"import pipelines; print(pipelines.read_manifest({out!r}))"
        where = shlex.quote(out)
        if job.sink.storage_options:
            # Without them nobody gets there, and only the job file has them.
            where = shlex.quote(str(path))
            show = (
                f"import pipelines as p; sink = p.load_job({str(path)!r}).sink; "
                "print(p.read_manifest(sink.path, storage_options=sink.storage_options))"
            )
        lines += ["next:", f"  ldm-batch {'errors' if summary.exit_code else 'status'} {where}"]
        if "://" not in out:
            folder = "images" if job.layout == "files" else "data"
            lines.append(f"  ls {shlex.quote(f'{out}/{folder}')}")
        lines.append(f"  python -c {shlex.quote(show)}")
    else:
        lines.append("stopped; the same command again does the rest")
    return "\n".join(lines)
