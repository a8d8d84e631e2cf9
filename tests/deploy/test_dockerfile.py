"""The image: what a Dockerfile can promise without an engine that builds it."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from pretrain import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of every instruction, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in whole.splitlines()]


@pytest.fixture(scope="module")
def lines() -> list[tuple[str, str]]:
    return instructions(DOCKERFILE.read_text())


def of(lines: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for found, arguments in lines if found == name]


def let_in(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository into the context."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().split() if not line.startswith("#")]
    kept = True
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = [path, *Path(path).parts]
        if any(fnmatch.fnmatch(part, pattern) for part in parts):
            kept = rule.startswith("!")
    return kept


def test_every_stage_begins_from_the_same_pinned_image_of_a_tested_python(
    lines: list[tuple[str, str]],
) -> None:
    images = [stage.split()[0] for stage in of(lines, "FROM")]
    assert len(images) == 2
    assert len(set(images)) == 1, "an environment is copied from one to the other, so both have one Python"
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", images[0]), "patch release and Debian are named"


def test_it_ends_as_a_user_who_is_not_root(lines: list[tuple[str, str]]) -> None:
    names = [name for name, _ in lines]
    [user] = of(lines, "USER")
    assert user == "1000:1000", "a number, so that Kubernetes can tell it is not root"
    last_root_work = max(place for place, name in enumerate(names) if name in ("RUN", "COPY"))
    assert names.index("USER") > last_root_work
    made = " ".join(of(lines, "RUN"))
    assert "--uid 1000" in made
    assert "--gid 1000" in made


def test_the_labels_say_what_it_is(lines: list[tuple[str, str]]) -> None:
    labels = dict(word.split("=", 1) for label in of(lines, "LABEL") for word in shlex.split(label))
    prefix = "org.opencontainers.image."
    assert all(name.startswith(prefix) for name in labels)
    assert labels[f"{prefix}title"] == PROJECT["name"]
    assert labels[f"{prefix}description"] == PROJECT["description"]
    assert labels[f"{prefix}licenses"] == PROJECT["license"]
    arguments = dict(argument.split("=", 1) for argument in of(lines, "ARG"))
    for name in ("version", "revision", "created"):
        assert labels[prefix + name] == f"${{{name.upper()}}}"
        assert name.upper() in arguments
    assert arguments["VERSION"] == PROJECT["version"] == __version__


def test_everything_that_is_copied_exists_and_nothing_else_is_sent_to_the_engine(
    lines: list[tuple[str, str]],
) -> None:
    sources = [
        source for copy in of(lines, "COPY") if not copy.startswith("--from=") for source in copy.split()[:-1]
    ]
    assert len(sources) >= 6
    for source in sources:
        assert (ROOT / source).exists(), source
        assert let_in(source.rstrip("/")), f".dockerignore leaves out {source}"
    assert let_in("pretrain/cli.py")
    assert let_in("configs/deepspeed/zero1.json")
    for name in (".git", ".venv", "data_shards", "runs", "tests", "docs", "deploy", "pretrain/__pycache__"):
        assert not let_in(name), name
    stages = {stage.split()[2] for stage in of(lines, "FROM") if " AS " in stage}
    assert {word for copy in of(lines, "COPY") for word in re.findall(r"--from=(\S+)", copy)} <= stages


def test_every_package_is_of_the_tested_set(lines: list[tuple[str, str]]) -> None:
    installs = re.findall(r"pip install ([^&]*)", " && ".join(of(lines, "RUN")))
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in install for install in installs)
    [extras] = [value.partition("=")[2] for value in of(lines, "ARG") if value.startswith("EXTRAS=")]
    assert '".[${EXTRAS}]"' in installs[-1]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    needed = [*PROJECT["dependencies"], "setuptools", "wheel"]
    for extra in extras.split(","):
        assert extra in PROJECT["optional-dependencies"], extra
        needed += PROJECT["optional-dependencies"][extra]
    names = {re.split(r"[<>=\[ ]", requirement)[0].lower().replace("_", "-") for requirement in needed}
    assert sorted(names - pinned) == []


def test_its_health_is_asked_where_a_run_answers(lines: list[tuple[str, str]]) -> None:
    from pretrain.metrics.exporter import PrometheusConfig

    port = str(PrometheusConfig().port)
    [health] = of(lines, "HEALTHCHECK")
    assert of(lines, "EXPOSE") == [port]
    command = json.loads(health.partition("CMD ")[2])
    assert command[:2] == ["python3", "-c"]
    assert f"http://127.0.0.1:{port}/healthz" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")


def test_no_instruction_downloads_or_runs_what_is_not_named(lines: list[tuple[str, str]]) -> None:
    assert {name for name, _ in lines} <= {
        "FROM", "ENV", "WORKDIR", "COPY", "RUN", "ARG", "LABEL", "USER", "EXPOSE", "HEALTHCHECK", "CMD",
    }  # fmt: skip
    ran = " ".join(of(lines, "RUN"))
    assert not re.search(r"curl|wget|\bgit\b|https?://|sudo", ran)
