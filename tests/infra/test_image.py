"""The Dockerfile, as far as it can be tried without a container engine."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.conftest import ROOT

DOCKERFILE = ROOT / "infra/Dockerfile"
TEXT = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text(encoding="utf-8"))
STEPS = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and not line.startswith("#")]
ARGS = dict(said.split("=", 1) for step, said in STEPS if step == "ARG" and "=" in said)


def said(step: str) -> list[str]:
    return [rest for name, rest in STEPS if name == step]


def copied() -> list[str]:
    """What is taken from the repository."""
    lines = [line.split() for line in said("COPY") if not line.startswith("--from=")]
    return [source for line in lines for source in line[:-1]]


def test_the_dockerfile_is_what_hadolint_would_write() -> None:
    found = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(found), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_stage_stands_on_a_pinned_base_or_on_a_stage_before_it() -> None:
    stages: list[str] = []
    for line in said("FROM"):
        base, _, name = line.partition(" AS ")
        for variant in ("cuda", "cpu"):
            filled = base.replace("${BASE}", ARGS["BASE"]).replace("${VARIANT}", variant)
            assert filled in stages or re.fullmatch(r"python:3\.\d+-slim-[a-z]+", filled), line
        stages.append(name)
    assert ARGS["VARIANT"] == "cuda"


def test_it_ends_as_a_user_that_kubernetes_can_tell_from_root() -> None:
    last = STEPS[max(i for i, (step, _) in enumerate(STEPS) if step == "FROM") :]
    assert [rest for step, rest in last if step == "USER"] == ["1000:1000"]
    assert any("useradd" in rest and "--uid 1000" in rest for step, rest in last if step == "RUN")


def test_a_login_shell_finds_the_same_programs_as_any_other() -> None:
    [command] = [
        part for line in said("RUN") for part in line.split("&&") if re.search(r"> /etc/profile\.d/\S+\.sh\s*$", part)
    ]
    profile = subprocess.run(
        ["sh", "-c", command.partition(" >")[0]], capture_output=True, text=True, check=True
    ).stdout
    # As /etc/profile of Debian does it: the path of its own, then what lies in profile.d.
    script = f'PATH=/usr/local/bin:/usr/bin:/bin\n{profile}\necho "$PATH"'
    path = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    [kept] = [found[1] for line in said("ENV") if (found := re.search(r"PATH=(\S+):\$PATH .*PYTHON", line))]
    assert path.strip() == f"{kept}:/usr/local/bin:/usr/bin:/bin"


def test_nothing_comes_from_an_address_nothing_of_apt_stays_and_nothing_is_secret() -> None:
    assert said("ADD") == []
    for line in said("RUN"):
        assert "apt-get install" not in line or line.count("rm -rf /var/lib/apt/lists/*") == 1
        assert "pip install" not in line or '--no-cache-dir -c "$CONSTRAINTS"' in line
        assert not re.search(r"curl|wget +-|https?://", line)
    names = re.findall(r"(\w+)=", " ".join(said("ARG") + said("ENV")))
    assert names
    assert [name for name in names if re.search(r"key|token|secret|password", name, re.IGNORECASE)] == []


def test_what_it_copies_is_in_the_repository_and_reaches_the_builder() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert copied()
    for source in copied():
        below = [path for path in tracked if path == source or path.startswith(f"{source}/")]
        assert below, source
        assert f"!{source}" in rules
        left_out = [rule for rule in rules[1:] if not rule.startswith("!")]
        assert [
            path for path in below for rule in left_out if fnmatch.fnmatch(f"/{path}", rule.replace("**", "*"))
        ] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for needed in (*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["project"]["readme"]):
        assert needed in copied()


def test_every_extra_exists_and_all_that_is_installed_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ARGS["EXTRAS"].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    # What a cluster's head and a job's pods need: Ray's dashboard.
    assert "submit" in extras
    needed = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    names = {re.split(r"[\[><=]", one)[0].lower() for one in needed}
    constraints = (ROOT / ARGS["CONSTRAINTS"]).read_text().splitlines()
    assert names <= {line.partition("==")[0].lower() for line in constraints if "==" in line}
