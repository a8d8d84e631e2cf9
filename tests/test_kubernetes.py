"""deploy/kubernetes/pretrain.yaml: valid by Kubernetes' own schema, with commands that pretrain knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pretrain.cli import parse
from pretrain.config import load_config
from pretrain.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    text = (REPOSITORY / "deploy" / "kubernetes" / "pretrain.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def container(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (only,) = documents["Job"]["spec"]["template"]["spec"]["containers"]
    return only


def constants(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def pretrain_arguments(container: dict[str, Any]) -> list[str]:
    arguments = container["args"]
    return arguments[arguments.index("pretrain") + 1 :]


def test_every_document_is_valid_by_the_schema_of_kubernetes(documents: dict[str, dict[str, Any]]) -> None:
    for document in documents.values():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_notices_a_field_that_does_not_exist(documents: dict[str, dict[str, Any]]) -> None:
    job = documents["Job"]
    wrong = {**job, "spec": {**job["spec"], "completionMod": "Indexed"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_numbers_that_must_agree_agree(
    documents: dict[str, dict[str, Any]], container: dict[str, Any]
) -> None:
    job, variables = documents["Job"]["spec"], constants(container)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(variables["NUM_NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == variables["NPROC"]


def test_rank_0_has_the_name_that_the_service_gives_it(
    documents: dict[str, dict[str, Any]], container: dict[str, Any]
) -> None:
    service, job = documents["Service"], documents["Job"]
    name, domain = constants(container)["MASTER_ADDR"].split(".")
    assert name == f"{job['metadata']['name']}-0"
    assert domain == service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}


def test_the_command_is_one_that_pretrain_understands(container: dict[str, Any]) -> None:
    arguments = parse(pretrain_arguments(container))
    assert arguments.command == "train"
    assert arguments.resume == "auto"
    config = load_config(REPOSITORY / arguments.config, arguments.overrides)
    variables = constants(container)
    world_size = int(variables["NUM_NODES"]) * int(variables["NPROC"])
    assert config.batch.global_size % (world_size * config.batch.accumulation_steps) == 0
    assert config.data.lanes % world_size == 0
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (arguments.output_dir, Path(config.data.shards)):
        assert any(path.is_relative_to(mount) for mount in mounts), f"{path} is lost with its pod"


def test_probes_ask_where_a_run_answers_and_leave_hangs_to_the_watchdog(container: dict[str, Any]) -> None:
    arguments = parse(pretrain_arguments(container))
    config = load_config(REPOSITORY / arguments.config, arguments.overrides)
    serving, limits = config.log.prometheus, config.watchdog
    assert serving.enabled
    assert serving.address == "0.0.0.0"  # the kubelet asks from outside the pod
    (port,) = container["ports"]
    assert port["containerPort"] == serving.port
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    longest = max(limits.data_seconds, limits.step_seconds, limits.checkpoint_seconds)
    assert serving.unhealthy_after_seconds > longest
    assert config.online_knn is None  # else limits.evaluation_seconds counts too


def test_wrong_input_fails_the_job_and_a_run_that_stopped_early_starts_again(
    documents: dict[str, dict[str, Any]],
) -> None:
    job = documents["Job"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # the policy is only heeded then
    actions = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert actions == {EXIT_USER_ERROR: "FailJob", EXIT_PREEMPTED: "Ignore"}
    assert job["backoffLimitPerIndex"] > 0


@pytest.mark.parametrize("code", [EXIT_USER_ERROR, EXIT_PREEMPTED])
def test_a_pod_ends_with_the_code_of_its_ranks(container: dict[str, Any], tmp_path: Path, code: int) -> None:
    """The command itself, torchrun included, with ranks that only end."""
    (tmp_path / "pretrain.py").write_text(f"import sys; sys.exit({code})")
    variables = {**constants(container), "NUM_NODES": "1", "NPROC": "1", "JOB_COMPLETION_INDEX": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    arguments = []
    for argument in container["args"]:
        for name, value in variables.items():
            argument = argument.replace(f"$({name})", value)  # as the kubelet does
        arguments.append(argument)
    command = [sys.executable, *container["command"][1:], *arguments]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
