"""Keys, seeds, duplicates, sweeps, batches and shards: what a plan promises before anything runs."""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.errors import JobError, OutputHeldByOther
from pipelines.job import Job
from pipelines.planner import Planned, check, plan
from pipelines.plans import read_plans
from pipelines.rows import derived_seed
from pipelines.storage import Store

MakeJob = Callable[..., Job]


def planned_rows(planned: Planned) -> list[dict[str, Any]]:
    assert planned.table is not None
    return planned.table.to_pylist()  # type: ignore[no-any-return]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_a_rows_own_columns_win_over_the_stage(make_job: MakeJob) -> None:
    own = {
        "id": "mine",
        "prompt": "p",
        "negative_prompt": "n",
        "seed": "9",
        "height": 128,
        "width": "72",
        "num_inference_steps": 7,
        "guidance_scale": "1.5",
        "scheduler": "Euler a",
        "license": "CC0",
    }
    first, second = planned_rows(check(make_job(source={"rows": [own, "plain"]}, stage={"negative_prompt": "bad"})))
    wanted = own | {"seed": 9, "width": 72, "guidance_scale": 1.5, "scheduler": "euler_a"}
    assert {name: first[name] for name in own} == wanted
    defaults = ("negative_prompt", "height", "num_inference_steps", "guidance_scale", "scheduler", "id", "license")
    assert [second[name] for name in defaults] == ["bad", 64, 2, 7.5, "ddim", None, None]


def test_exact_duplicates_are_made_once_and_counted(make_job: MakeJob) -> None:
    planned = check(make_job(source={"rows": ["a", "b", "a", "a", {"prompt": "a", "seed": 5}]}))
    assert (planned.num_source_rows, planned.num_rows, planned.num_duplicates) == (5, 3, 2)
    assert sorted((r["prompt"], r["num_duplicates"]) for r in planned_rows(planned)) == [("a", 0), ("a", 2), ("b", 0)]


def test_rows_that_differ_only_in_a_column_that_passes_through_are_both_made(make_job: MakeJob) -> None:
    rows = [{"prompt": "a", "sku": "1"}, {"prompt": "a", "sku": "2"}, {"prompt": "a", "sku": "1"}, {"prompt": "a"}]
    planned = check(make_job(source={"rows": rows}))
    made = planned_rows(planned)
    assert sorted((r["sku"] or "", r["num_duplicates"]) for r in made) == [("", 0), ("1", 1), ("2", 0)]
    # One prompt, so one picture, whatever the note beside it says.
    assert len({r["seed"] for r in made}) == 1
    backwards = check(make_job(source={"rows": rows[::-1]}))
    assert {r["key"] for r in planned_rows(backwards)} == {r["key"] for r in made}


def test_a_column_that_the_job_leaves_out_tells_no_rows_apart(make_job: MakeJob) -> None:
    rows = [{"prompt": "a", "sku": "1", "seen": 3}, {"prompt": "a", "sku": "1", "seen": 4}]
    (row,) = planned_rows(check(make_job(source={"rows": rows, "pass_through": ["sku"]})))
    assert (row["sku"], row["num_duplicates"], "seen" in row) == ("1", 1, False)
    (row,) = planned_rows(check(make_job(source={"rows": rows, "pass_through": []})))
    assert (row["num_duplicates"], "sku" in row) == (1, False)
    with pytest.raises(JobError, match=r"source.pass_through: no column 'sko'; the table has 'prompt', "):
        check(make_job(source={"rows": rows, "pass_through": ["sko"]}))


def test_a_row_with_an_id_stays_itself_when_a_note_beside_it_changes(make_job: MakeJob, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,prompt,note\n1,a,old\n")
    job = make_job(source={"path": str(table)})
    plan(job)
    table.write_text("id,prompt,note\n1,a,new\n")
    assert plan(job).new is None
    table.write_text("id,prompt,note\n1,a,new\n1,a,newer\n")
    with pytest.raises(JobError, match="row 2: id '1' stands on another row with other content"):
        check(job)


def test_a_mended_prompt_under_a_planned_id_is_told_and_not_lost(make_job: MakeJob, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,prompt\n1,a rde ring\n2,b\n")
    job = make_job(source={"path": str(table)})
    plan(job)
    table.write_text("id,prompt\n1,a red ring\n2,b\n")
    with pytest.raises(
        JobError, match=r"row 1: id '1' is in .*out already, made from other content: give the row a new"
    ):
        plan(job)
    extended = plan(job, extend=True)
    assert [r["prompt"] for r in planned_rows(extended)] == ["a red ring"]
    assert extended.num_gone == 1
    assert plan(job).new is None


def test_a_dead_letter_is_mended_under_its_own_id(make_job: MakeJob, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,prompt,height\n1,a,7\n2,b,64\n")
    job = make_job(source={"path": str(table), "on_bad_row": "fail"})
    assert plan(job).num_wrong == 1
    table.write_text("id,prompt,height\n1,a,64\n2,b,64\n")
    assert [r["id"] for r in planned_rows(plan(job))] == ["1"]


def test_rows_taken_out_of_a_planned_table_are_counted(make_job: MakeJob) -> None:
    plan(make_job(source={"rows": ["a", "b", "c"]}))
    assert plan(make_job(source={"rows": ["b"]})).num_gone == 2
    assert plan(make_job(source={"rows": ["a", "b", "c"]}), limit=1).num_gone == 0


def test_bytes_may_pass_through(make_job: MakeJob) -> None:
    (row,) = planned_rows(plan(make_job(source={"rows": [{"prompt": "a", "icon": b"\xff\x00"}]})))
    assert row["icon"] == b"\xff\x00"


def test_a_seed_follows_from_the_row_and_not_from_its_place(make_job: MakeJob) -> None:
    seeds = {r["prompt"]: r["seed"] for r in planned_rows(check(make_job(seed=3, source={"rows": ["a", "b"]})))}
    again = {r["prompt"]: r["seed"] for r in planned_rows(check(make_job(seed=3, source={"rows": ["c", "b", "a"]})))}
    assert seeds.items() <= again.items()
    assert len(set(again.values())) == 3
    assert all(0 <= seed < 2**63 for seed in again.values())
    other = {r["prompt"]: r["seed"] for r in planned_rows(check(make_job(seed=4, source={"rows": ["a", "b"]})))}
    assert not set(other.values()) & set(seeds.values())


@given(st.integers(0, 2**63 - 1), st.text(), st.integers(0, 99))
def test_every_derived_seed_fits_into_arrow(job_seed: int, identity: str, image: int) -> None:
    text = identity.encode("utf-8", "ignore").decode()
    assert 0 <= derived_seed(job_seed, text, image) < 2**63


def test_several_images_of_a_row_have_seeds_and_ids_of_their_own(make_job: MakeJob) -> None:
    rows = [{"prompt": "a", "id": "x", "seed": 10}, {"prompt": "a", "id": "y", "seed": ""}]
    planned = planned_rows(check(make_job(source={"rows": rows}, stage={"num_images_per_prompt": 3})))
    seeds = {r["id"]: r["seed"] for r in planned}
    assert seeds["x#0"] == 10
    assert len(set(seeds.values())) == 6
    numbered = make_job(
        source={"rows": [{"prompt": "a", "seed": s} for s in (1, 2, 3)]}, stage={"num_images_per_prompt": 4}
    )
    assert check(numbered).num_rows == 12


def test_rows_with_and_without_a_negative_prompt_share_no_batch(make_job: MakeJob) -> None:
    rows = [{"prompt": f"p{i}", "negative_prompt": "blue" if i % 2 else ""} for i in range(8)]
    planned = planned_rows(check(make_job(source={"rows": rows}, stage={"batch_size": 4})))
    batches = {row["batch"]: set() for row in planned}
    for row in planned:
        batches[row["batch"]].add(bool(row["negative_prompt"]))
    assert sorted(batches.values(), key=str) == [{False}, {True}]


def test_a_matrix_makes_every_combination_under_the_same_noise(make_job: MakeJob) -> None:
    source = {"rows": ["a", "b"], "matrix": {"guidance_scale": [1, 5], "num_inference_steps": [2, 3, 4]}}
    planned = planned_rows(check(make_job(source=source)))
    combinations = {(r["prompt"], r["guidance_scale"], r["num_inference_steps"]) for r in planned}
    assert combinations == {(p, g, n) for p in "ab" for g in (1.0, 5.0) for n in (2, 3, 4)}
    assert len({r["seed"] for r in planned if r["prompt"] == "a"}) == 1
    seeds = planned_rows(check(make_job(source={"rows": ["a"], "matrix": {"seed": [1, 2, 3]}})))
    assert sorted(r["seed"] for r in seeds) == [1, 2, 3]


def test_templates_build_the_prompt_from_columns(make_job: MakeJob) -> None:
    source = {
        "rows": [{"size": "small", "color": "red"}],
        "templates": {"prompt": "a {{ size }} {{ color|upper }} dot"},
    }
    row = planned_rows(check(make_job(source=source)))[0]
    assert (row["prompt"], row["color"]) == ("a small RED dot", "red")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nope }}", "row 1: template prompt: 'nope' is undefined in this row; the table has color"),
        ("{{ color", "source.templates.prompt: unexpected end of template"),
        ("{{ color.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "row 1: template prompt: division by zero"),
        ("{{ color|dictsort }}", "row 1: template prompt: 'str' object has no attribute"),
        ("{{ color|random }}", "No filter named 'random'"),
        ("{{ empty }}", "row 1: template prompt: 'empty' is undefined in this row"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(make_job: MakeJob, template: str, message: str) -> None:
    with pytest.raises(JobError, match=message.replace("(", r"\(")):
        check(make_job(source={"rows": [{"color": "red", "empty": None}], "templates": {"prompt": template}}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "rows row 2: prompt is empty"),
        ({"prompt": "  "}, "row 2: prompt is empty"),
        ({"height": 500}, "row 2: height 500 is not a multiple of 8; use 496 or 504"),
        ({"width": 3}, "row 2: width 3 is out of range; 8 to 16384"),
        ({"num_inference_steps": -4}, "row 2: num_inference_steps -4 is out of range; 1 to 1000"),
        ({"num_inference_steps": "2.5"}, "row 2: num_inference_steps '2.5' is not a whole number"),
        ({"num_inference_steps": True}, "row 2: num_inference_steps 'True' is not a whole number"),
        ({"guidance_scale": "high"}, "row 2: guidance_scale 'high' is not a number"),
        ({"guidance_scale": float("inf")}, "row 2: guidance_scale inf is out of range; 0 to 100"),
        ({"seed": 2**63}, "row 2: seed 9223372036854775808 is out of range"),
        ({"seed": -1}, "row 2: seed -1 is out of range"),
        ({"scheduler": "eulr"}, "row 2: unknown scheduler 'eulr'; did you mean euler"),
        ({"scheduler": "flow_euler"}, "row 2: scheduler flow_euler does not fit StableDiffusionPipeline"),
        ({"id": "x" * 10_240}, "row 2: id has 10240 characters; at most 512"),
        ({"id": "a\0b"}, "row 2: id 'a\\x00b' holds a control character"),
        ({"prompt": "\ud800"}, "row 2: prompt holds half a surrogate pair"),
    ],
)
def test_a_wrong_row_is_named_before_anything_runs(make_job: MakeJob, row: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        # Inline rows pass through YAML, which writes some of these values differently; the table is what counts.
        check(
            make_job(source={"rows": ["fine"]}).model_copy(update={"source": source(["fine", {"prompt": "p", **row}])})
        )
    assert message in str(caught.value)
    assert "set source.on_bad_row: fail to make the others" in str(caught.value)


def source(rows: list[Any]) -> Any:
    from pipelines.job import Source

    return Source(rows=rows)


@pytest.mark.parametrize("row_id", ["../../x", "a/b", "C:\\x", "CON", ".", "…", "🙂"])
def test_hostile_ids_stay_in_the_manifest_and_never_name_a_file(make_job: MakeJob, row_id: str) -> None:
    row = planned_rows(check(make_job(source={"rows": [{"prompt": "p", "id": row_id}]})))[0]
    assert row["id"] == row_id
    assert row["key"].isalnum()


def test_ids_that_differ_in_case_are_two_rows(make_job: MakeJob) -> None:
    rows = [{"prompt": "p", "id": "a"}, {"prompt": "p", "id": "A"}]
    assert len({r["key"] for r in planned_rows(check(make_job(source={"rows": rows})))}) == 2


def test_one_id_on_two_different_rows_is_refused(make_job: MakeJob) -> None:
    rows = [{"prompt": "p", "id": "a"}, {"prompt": "q", "id": "a"}]
    with pytest.raises(JobError, match="row 2: id 'a' stands on another row with other content; ids must be unique"):
        check(make_job(source={"rows": rows}))


def test_bad_rows_can_become_dead_letters_beside_the_good_ones(make_job: MakeJob) -> None:
    rows = ["good", {"prompt": "bad", "height": 500}, {"prompt": ""}]
    planned = check(make_job(source={"rows": rows, "on_bad_row": "fail"}))
    assert (planned.num_rows, planned.num_wrong) == (3, 2)
    problems = [r["problem"] for r in planned_rows(planned)]
    assert problems[0] is None
    assert sum("not a multiple of 8" in (p or "") for p in problems) == 1
    assert {row["prompt"] for row in planned_rows(planned)} == {"good", "bad", ""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"rows": []}}, "source.rows is empty"),
        (
            {"source": {"rows": [{"caption": "x"}]}},
            "no column 'prompt'; the table has 'caption'; name it with source.columns",
        ),
        ({"source": {"rows": ["x"], "columns": {"seed": "s"}}}, "source.columns.seed: no column 's'"),
        ({"source": {"rows": [{"prompt": "x", "seed": 1}], "matrix": {"seed": [1]}}}, "seed is a column and an axis"),
        (
            {"source": {"rows": ["x"], "matrix": {"height": [500]}}},
            "source.matrix.height: height 500 is not a multiple",
        ),
        (
            {
                "source": {
                    "rows": ["x"],
                    "matrix": {"seed": list(range(1000)), "guidance_scale": list(range(1, 99)), "height": [64, 128]},
                }
            },
            "makes 196000 pictures of each row",
        ),
        ({"stage": {"height": 500}}, "stages.0.height: height 500 is not a multiple of 8; use 496 or 504"),
        ({"stage": {"scheduler": "flow_euler"}}, "stages.0.scheduler: scheduler flow_euler does not fit"),
        ({"stage": {"safety_checker": "reject"}}, "stages.0.safety_checker: .* has no safety checker"),
        ({"stage": {"model": "builtin:shape"}}, "no such built-in model; one of shapes"),
        ({"stage": {"model": "builtin:shapes", "variant": "fp16"}}, "a built-in model has no revision and no variant"),
        ({"stage": {"variant": "fp16"}}, "no weights of variant fp16"),
        ({"stage": {"model": "org/name"}}, "a hub model needs `revision:`"),
        ({"stage": {"model": "./nowhere"}}, "no such folder; give builtin:NAME"),
        ({"stage": {"model": "org/name", "revision": "v1"}}, "model org/name@v1: not to be had"),
    ],
)
def test_a_job_that_cannot_work_is_refused(make_job: MakeJob, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        check(make_job(**changes))


def test_more_noise_than_an_upscaler_knows_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    from tests.models import tiny_sd_x4

    tiny_sd_x4().save_pretrained(tmp_path / "x4")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    fields = {"source": {"path": str(tmp_path / "in")}}
    stage = {"op": "upscale", "model": str(tmp_path / "x4")}
    with pytest.raises(JobError, match=r"stages.0.noise_level: 351 is more than .* takes; 0 to 350"):
        check(make_job(stage=stage | {"noise_level": 351}, **fields))
    assert check(make_job(stage=stage | {"noise_level": 350}, **fields)).num_rows == 1


def test_an_empty_table_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt\n")
    with pytest.raises(JobError, match="the table has no rows; there is nothing to make"):
        check(make_job(source={"path": str(tmp_path / "t.csv")}))


def test_batches_never_mix_what_must_be_equal(make_job: MakeJob) -> None:
    rng = random.Random(1)
    rows = [
        {
            "prompt": f"p{i}",
            "height": rng.choice([64, 128]),
            "num_inference_steps": rng.choice([2, 3]),
            "guidance_scale": rng.choice([1.0, 5.0]),
            "scheduler": rng.choice(["ddim", "euler"]),
        }
        for i in range(200)
    ]
    planned = check(make_job(source={"rows": rows}, stage={"batch_size": 4}, batches_per_shard=3))
    batches: dict[int, list[dict[str, Any]]] = {}
    for row in planned_rows(planned):
        batches.setdefault(row["batch"], []).append(row)
    names = ("height", "width", "num_inference_steps", "guidance_scale", "scheduler")
    for batch in batches.values():
        assert len(batch) <= 4
        assert len({tuple(row[name] for name in names) for row in batch}) == 1
        assert len({row["shard"] for row in batch}) == 1
    assert planned.new is not None
    assert len(batches) == planned.new.num_batches
    assert (
        max(len({r["batch"] for r in planned_rows(planned) if r["shard"] == s.index}) for s in planned.new.shards) == 3
    )


def test_rows_of_one_prompt_stand_together_so_that_few_workers_encode_it(make_job: MakeJob) -> None:
    rows = [{"prompt": f"p{i % 20}", "seed": i, "num_inference_steps": 2 + i % 2} for i in range(200)]
    planned = planned_rows(check(make_job(source={"rows": rows}, stage={"batch_size": 4}, batches_per_shard=5)))
    meetings = {(row["num_inference_steps"], row["prompt"], row["shard"]) for row in planned}
    assert len(meetings) == 20  # ten rows each, in one shard


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)))
def test_shuffled_rows_give_the_same_plan(tiny_model: Path, order: list[int]) -> None:
    from pipelines.job import parse_job

    rows = [f"prompt {i % 10}" for i in range(12)]
    import yaml

    def plan_id(rows: list[str]) -> str:
        stage = {"op": "txt2img", "model": str(tiny_model), "batch_size": 2}
        data = {"source": {"rows": rows}, "stages": [stage], "sink": {"path": "nowhere"}}
        new = check(parse_job(yaml.safe_dump(data))).new
        assert new is not None
        return new.plan_id

    assert plan_id(rows) == plan_id([rows[i] for i in order])


def test_planning_twice_writes_one_plan(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(source={"rows": ["a", "b", "c"]})
    first, second = plan(job), plan(job)
    assert first.new is not None
    assert second.new is None
    assert second.num_known == 3
    rows = pq.read_table(tmp_path / "out" / first.new.shards[0].file)
    assert rows.num_rows == 3
    assert sorted({shard.file for shard in first.new.shards}) == [first.new.shards[0].file]
    assert rows["shard"].value_counts().to_pylist() == [
        {"values": shard.index, "counts": shard.num_rows} for shard in first.new.shards
    ]


def test_a_table_that_has_grown_adds_a_plan_with_only_the_new_rows(make_job: MakeJob, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("prompt\na\nb\n")
    job = make_job(source={"path": str(table)})
    plan(job)
    table.write_text("prompt\nc\nb\na\n")
    grown = plan(job)
    assert [row["prompt"] for row in planned_rows(grown)] == ["c"]
    assert [p.num_rows for p in read_plans(Store(str(tmp_path / "out")))] == [2, 1]


def test_limit_takes_the_first_rows_and_a_later_plan_the_rest(make_job: MakeJob) -> None:
    job = make_job(source={"rows": ["a", "b", "c"]})
    assert plan(job, limit=2).num_rows == 2
    rest = plan(job)
    assert (rest.num_known, [row["prompt"] for row in planned_rows(rest)]) == (2, ["c"])


def test_an_output_of_another_job_is_refused_with_the_difference(make_job: MakeJob, tmp_path: Path) -> None:
    plan(make_job(stage={"num_inference_steps": 2}))
    changed = make_job(stage={"num_inference_steps": 3})
    with pytest.raises(OutputHeldByOther) as caught:
        plan(changed)
    assert str(caught.value).startswith(
        f"{tmp_path / 'out'} holds another job (stages.0.num_inference_steps 2, now 3): choose a new sink.path"
    )
    extended = plan(changed, extend=True)
    assert extended.new is not None
    assert [p.num_rows for p in extended.plans] == [1, 1]


def test_of_another_job_only_what_was_asked_for_is_told(make_job: MakeJob) -> None:
    plan(make_job())
    with pytest.raises(OutputHeldByOther, match=r"holds another job \(stages.0.accelerate.deep_cache None, now 2\):"):
        plan(make_job(stage={"accelerate": {"deep_cache": 2}}))


def test_workers_and_gpus_are_no_other_job(make_job: MakeJob) -> None:
    plan(make_job())
    assert plan(make_job(stage={"workers": 2, "num_cpus": 0.5, "device": "cpu"})).new is None


def test_columns_that_pass_through_keep_their_names_and_types(make_job: MakeJob) -> None:
    rows = [{"prompt": "p", "count": 3, "tags": ["x"], "status": "mine", "mixed": 1}, {"prompt": "q", "mixed": "two"}]
    row = next(r for r in planned_rows(check(make_job(source={"rows": rows}))) if r["prompt"] == "p")
    assert (row["count"], row["tags"], row["input.status"], row["mixed"]) == (3, ["x"], "mine", "1")
    both = {"prompt": "p", "status": 1, "input.status": 2, "image": 3, "empty": {}}
    plan(make_job(source={"rows": [both]}))
    row = planned_rows(check(make_job(source={"rows": [both]})))[0]
    assert (row["input.input.status"], row["input.status"], row["input.image"], row["empty"]) == (1, 2, 3, "{}")


def test_a_table_that_stays_as_it_was_is_not_read_again(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,seed\na ring,1\na ring,1\na star,2\n")
    job = make_job(source={"path": str(table)})
    first = plan(job)
    numbers = ("num_source_rows", "num_pictures", "num_duplicates", "num_rows", "num_wrong", "num_gone", "num_shards")
    with monkeypatch.context() as unreadable:
        unreadable.setattr("pipelines.planner.read_source", lambda *_: pytest.fail("the rows were read"))
        again = plan(job.model_copy(update={"max_failed": None}))
    assert [getattr(again, name) for name in numbers] == [getattr(first, name) for name in numbers]
    assert (again.new, again.num_known) == (None, 2)
    assert again.plans == first.plans

    table.write_text("prompt,seed\na ring,1\na ring,1\na moon,2\n")
    other = plan(job)
    assert (other.num_known, other.num_gone, other.new is not None) == (1, 1, True)
    # As it was once: all known, and the row that came meanwhile is not of this table.
    table.write_text("prompt,seed\na ring,1\na ring,1\na star,2\n")
    back = plan(job)
    assert (back.new, back.num_known, back.num_gone) == (None, 2, 1)


def test_a_table_is_read_again_where_its_files_may_have_changed_or_its_plan_is_gone(
    make_job: MakeJob, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    table = tmp_path / "images.csv"
    table.write_text("image,prompt\na.png,a ring\n")
    job = make_job({"op": "img2img", "num_inference_steps": 4}, source={"path": str(table)})
    assert [plan(job).num_known for _ in range(2)] == [0, 1]
    Image.new("RGB", (64, 64), "blue").save(picture)
    assert plan(job).num_known == 0

    job = make_job(source={"rows": ["a ring"]}, sink=str(tmp_path / "other"))
    plan(job)
    shutil.rmtree(tmp_path / "other/_ldm/plans" / plan(job).plans[0].plan_id)
    (tmp_path / "other/_ldm/plans/0001.json").unlink()
    assert plan(job).new is not None
