"""What is deployed is valid by its schema, holds together, and mounts what is there."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from server.bases import EMBEDDED_BASES
from server.config import ServerConfig, add_flags, load_config

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
MANIFEST = ROOT / "deploy/kubernetes/multilora.yaml"
DOCUMENTS: dict[str, Any] = {}
for _document in yaml.safe_load_all(MANIFEST.read_text()):
    DOCUMENTS.setdefault(_document["kind"], _document)
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DRAIN_S = ServerConfig().drain_timeout


def image_paths() -> set[str]:
    """Directories that the image has for volumes."""
    found: list[str] = json.loads(re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.M)[0])
    return {*found, re.findall(r"MULTILORA_ADAPTER_DIR=(\S+)", DOCKERFILE)[0]}


def serve_settings(flags: list[str]) -> ServerConfig:
    """What the server makes of them; an unknown flag ends it."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return load_config(vars(parser.parse_args(flags)), {"MULTILORA_ALLOW_PUBLIC": "true"})


def test_compose_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_mounts_what_is_there() -> None:
    named = set(COMPOSE["volumes"])
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            if source != "./adapters":  # the user's
                assert source in named or (source.startswith("./") and (ROOT / source).exists()), volume
    inside = {re.sub(r"\$\{.*?\}", "", volume).split(":")[1] for volume in SERVICES["server"]["volumes"]}
    assert inside == image_paths()
    assert serve_settings(SERVICES["server"]["command"]).log_format == "json"
    assert int(SERVICES["server"]["stop_grace_period"].rstrip("s")) > DRAIN_S


def test_prometheus_asks_the_server_and_grafana_asks_prometheus() -> None:
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/datasources.yaml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/dashboards.yaml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert f"./dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/grafana.json"
    assert (ROOT / "dashboards/grafana.json").is_file()


def test_kubernetes_manifest_is_valid() -> None:
    version = kubernetes_validate.latest_version()
    for document in yaml.safe_load_all(MANIFEST.read_text()):
        kubernetes_validate.validate(document, version, strict=True)


def test_kubernetes_manifest_holds_together() -> None:
    deployment, service = DOCUMENTS["Deployment"]["spec"], DOCUMENTS["Service"]["spec"]
    template = deployment["template"]
    assert deployment["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == ServerConfig().port
    assert [p["targetPort"] for p in service["ports"]] == [port["name"]]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/ready"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in template["spec"]["volumes"]}
    assert image_paths() < set(mounted.values())
    assert template["spec"]["terminationGracePeriodSeconds"] > DRAIN_S
    settings = serve_settings(container["args"])
    assert settings.api_key_file == f"{mounted['keys']}/keys.json"


def test_kubernetes_runs_it_as_the_image_does_without_root() -> None:
    pod = DOCUMENTS["Deployment"]["spec"]["template"]["spec"]
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.M)
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert pod["securityContext"]["runAsNonRoot"]
    own = pod["containers"][0]["securityContext"]
    assert own == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_the_dockerfile_copies_what_is_there_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M)
    assert copied
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
        assert f"!{Path(name).parts[0]}" in ignored, name


def test_the_image_names_settings_that_the_server_has() -> None:
    names = re.findall(r"MULTILORA_(\w+)=", DOCKERFILE)
    assert names
    assert {name.lower() for name in names} <= set(ServerConfig.__dataclass_fields__)


def test_the_bases_of_the_image_are_those_that_the_server_embeds() -> None:
    for base in EMBEDDED_BASES.values():
        assert base.package in DOCKERFILE
        assert base.package in (ROOT / "Makefile").read_text()
