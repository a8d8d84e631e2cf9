"""What can be known of the containers without an engine: images, doors, secrets, what they may write to."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# services that answer, and their doors
DOORS = {
    "prometheus": 9090,
    "alertmanager": 9093,
    "grafana": 3000,
    "node-exporter": 9100,
    "dcgm-exporter": 9400,
}
each = pytest.mark.parametrize("name", SERVICES)


@each
def test_images_have_a_version_of_their_own(name: str) -> None:
    _, _, tag = SERVICES[name]["image"].rpartition(":")
    assert re.fullmatch(r"v?\d+\.\d+\.\d+(-\d+\.\d+\.\d+-distroless)?", tag), tag


@each
def test_nothing_is_open_to_the_network(name: str) -> None:
    service = SERVICES[name]
    assert service["network_mode"] == "host"  # so no ports are published, and what is listened at decides
    assert "ports" not in service
    if name in DOORS:
        said = [*service.get("command", []), *map(str, service.get("environment", {}).values())]
        door = str(DOORS[name])
        listening = [text for text in said if door in text or text == "127.0.0.1"]
        assert any("127.0.0.1" in text for text in listening)
        assert not any(re.search(rf"(0\.0\.0\.0|=):{door}", text) for text in said)


@each
def test_what_is_not_its_own_is_read_only(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileged")
    for volume in service.get("volumes", []):
        # ${RUNS:?...} has colons of its own
        source, target, *mode = re.sub(r"\$\{[^}]*\}", "RUNS", volume).split(":")
        if source in COMPOSE["volumes"]:
            continue
        assert "ro" in ",".join(mode).split(","), f"{target} may be written to"


@each
def test_a_service_that_stays_is_checked(name: str) -> None:
    service = SERVICES[name]
    if service["restart"] == "no" or name == "dcgm-exporter":  # whose image has nothing to check with
        return
    assert service["healthcheck"]["test"][0] == "CMD"


@each
def test_what_is_mounted_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        if volume.startswith("./"):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume


def test_volumes_are_named_and_used() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert set(COMPOSE["volumes"]) <= used


def test_grafana_knows_nobody_and_wants_a_password() -> None:
    grafana = SERVICES["grafana"]
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert not any("PASSWORD" in name for name in grafana["environment"])
    assert grafana["env_file"] == "grafana.env"
    assert "GF_SECURITY_ADMIN_PASSWORD=\n" in (DEPLOY / "grafana.env.example").read_text()  # none is given
    assert "grafana.env" in (DEPLOY / ".gitignore").read_text().split()


@pytest.mark.parametrize("password", ["", "admin", "0123456789a", "correct horse battery"])
def test_grafana_does_not_start_with_a_short_password(password: str, tmp_path: Path) -> None:
    """Its entry point, in this shell: a stand-in for /run.sh tells that it came so far."""
    (tmp_path / "run.sh").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "run.sh").chmod(0o755)
    shell, flag, line = SERVICES["grafana"]["entrypoint"]
    line = line.replace("$$", "$").replace("exec /run.sh", f"exec {tmp_path / 'run.sh'}")
    ran = subprocess.run(
        [shell, flag, line],
        env={"GF_SECURITY_ADMIN_PASSWORD": password},
        capture_output=True,
        text=True,
        timeout=20,
    )
    is_long = len(password) >= 12
    assert ran.returncode == (0 if is_long else 2)
    assert ran.stdout == ("started\n" if is_long else "")
    assert is_long or "12 characters" in ran.stderr


def test_provisioning_points_to_what_compose_starts() -> None:
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert [source["url"] for source in sources["datasources"]] == [
        f"http://127.0.0.1:{DOORS['prometheus']}",
        f"http://127.0.0.1:{DOORS['alertmanager']}",
    ]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/pretrain.yml").read_text())[
        "providers"
    ]
    assert any(
        volume == f"./grafana/dashboards:{provider['options']['path']}:ro"
        for volume in SERVICES["grafana"]["volumes"]
    )
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana" / "dashboards" / Path(home).name).is_file()


def test_nothing_that_is_deployed_holds_a_secret() -> None:
    # a key with a value behind it, which is neither a path nor a variable
    secret = re.compile(r"(?i)\b\w*(password|secret|token|api_?key)\w*[:=][ \t]*([^\s/$#{].*)")
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix in (".yml", ".yaml", ".env", ".example", ".json"):
            assert secret.findall(path.read_text()) == [], path
