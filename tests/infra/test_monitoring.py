"""What watches the runs, held against the figures that they export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from pipelines.metrics import METRICS
from tests.conftest import ROOT
from tests.stores import Unavailable
from tests.stores.ceph import unpacked

RULES = yaml.safe_load((ROOT / "infra/prometheus/rules.yml").read_text())
SCRAPE = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text())
DASHBOARD = json.loads((ROOT / "infra/grafana/ldm-batch.json").read_text())
RULE_LIST = [rule for group in RULES["groups"] for rule in group["rules"]]
RECORDED = {rule["record"] for rule in RULE_LIST if "record" in rule}
ENDINGS = {"Histogram": ("_bucket", "_sum", "_count"), "Counter": ("",), "Gauge": ("",)}
EXPORTED = {
    f"ray_{name}{ending}": {*tags, "SessionName", *(["le"] if ending == "_bucket" else [])}
    for name, (kind, _, tags) in METRICS.items()
    for ending in ENDINGS[kind]
}
"""Name at the agent → labels that a rule may count on; SessionName is Ray's own."""

COLUMNS = 24


def in_dashboard() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def plain(expression: str) -> str:
    """Without Grafana's variables."""
    return expression.replace("$__rate_interval", "5m").replace("$session", "s").replace("$job", "j")


def nodes(node: Any) -> Iterator[Any]:
    yield node
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    for child in [*children, *(getattr(node, "args", None) or [])]:
        if child is not None:
            yield from nodes(child)


def faults(expression: str) -> list[str]:
    """Names and labels that nothing exports."""
    out = []
    for node in nodes(promql_parser.parse(plain(expression))):
        below = [one for one in nodes(node) if type(one).__name__ == "VectorSelector"]
        known = set().union(*(EXPORTED.get(one.name, set()) for one in below))
        for one in below:
            if one.name not in EXPORTED and one.name not in RECORDED:
                out.append(f"no figure {one.name}")
            if one.name in RECORDED:
                known |= {"SessionName", "stage", "status", "ldm_job"}
        if type(node).__name__ == "VectorSelector":
            out += [f"{node.name} has no {m.name}" for m in node.matchers.matchers if m.name not in known]
        if type(node).__name__ == "AggregateExpr" and node.modifier is not None:
            out += [f"nothing has {label}" for label in node.modifier.labels if label not in known]
    return out


@pytest.mark.parametrize("rule", RULE_LIST, ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_counts_on_figures_and_labels_that_exist(rule: dict[str, Any]) -> None:
    assert faults(rule["expr"]) == []
    if "alert" in rule:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert named <= {"ldm_job", "stage"}


@pytest.mark.parametrize(
    "wrong", ["ray_ldm_rows", 'ray_ldm_rows_total{kind="a"}', "sum by (job) (ray_ldm_upload_seconds_count)"]
)
def test_a_figure_or_label_that_nothing_exports_would_be_found(wrong: str) -> None:
    assert faults(wrong)


def test_the_dashboard_shows_all_six_figures_and_no_other() -> None:
    assert [fault for expression in in_dashboard() for fault in faults(expression)] == []
    shown = {
        node.name
        for expression in in_dashboard()
        for node in nodes(promql_parser.parse(plain(expression)))
        if type(node).__name__ == "VectorSelector"
    }
    assert {name.removesuffix("_bucket") for name in shown} == {f"ray_{name}" for name in METRICS}


def test_the_panels_have_numbers_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= COLUMNS
        assert not cells & taken
        taken |= cells
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(panels)))
    assert used == variables == {"datasource", "session", "job"}


def test_what_is_scraped_is_there() -> None:
    assert [(ROOT / "infra/prometheus" / name).exists() for name in SCRAPE["rule_files"]] == [True]
    monitor = yaml.safe_load((ROOT / "infra/kubernetes/components/monitoring/pod_monitor.yaml").read_text())
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    cluster = yaml.safe_load((ROOT / "infra/kubernetes/examples/raycluster.yaml").read_text())
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert endpoint["port"] in {port["name"] for port in ports}


def promtool() -> str:
    """Prometheus' own program, of this machine or of Debian's package."""
    if found := shutil.which("promtool"):
        return found
    only = re.compile(r"^'[^']+' (prometheus_\S*\.deb) ", re.MULTILINE)
    try:
        return str(unpacked("prometheus", ("prometheus",), only) / "usr/bin/promtool")
    except Unavailable as why:
        pytest.skip(f"promtool cannot be had: {why}")


def test_alerts_are_raised_by_what_is_wrong_and_by_nothing_else() -> None:
    cases = ROOT / "tests/infra/rules_test.yml"
    done = subprocess.run([promtool(), "test", "rules", str(cases)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
