"""Images, compose file and manifests: structure, references and hardening.

Without a docker daemon and without a cluster: nothing here is built or started. Where `kubectl` is
there, it builds the kustomizations; else their resources are read as they lie there.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from prunecast.cli.main import app

ROOT = Path(__file__).parents[2]
CONTAINERS, KUBERNETES = ROOT / "deploy/containers", ROOT / "deploy/kubernetes"
TEXT = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")

# of the Compose Specification, what the file uses; a word that is not here is a slip
SERVICE = {
    *("image", "build", "user", "restart", "init", "read_only", "cap_drop", "security_opt"),
    *("pids_limit", "tmpfs", "healthcheck", "logging", "command", "ports", "networks", "volumes"),
    *("secrets", "stop_grace_period", "deploy", "profiles", "environment", "depends_on"),
    "shm_size",
}


def flags(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Programs of a command, the watch's first, with their options."""
    while "--" in words:
        place = words.index("--")
        yield words[0], words[:place]
        words = words[place + 1 :]
    yield words[0], words


def check_command(words: list[str]) -> None:
    for program, own in flags(words):
        if program in ("flower-superlink", "flower-supernode"):
            continue  # tests of the units ask Flower for its options
        names = [word for word in own if re.fullmatch("[a-z]+", word) and word != "prunecast"]
        result = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, words
        for word in own:
            if word.startswith("--"):
                assert word.partition("=")[0] in result.output, f"{names} has no {word}"


# -- image ----------------------------------------------------------------------------------------


def test_the_image_is_built_of_what_there_is_and_runs_as_nobody_else() -> None:
    text = (CONTAINERS / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "LABEL", "USER", "VOLUME"}
    assert {name for name, _ in steps} == known | {"STOPSIGNAL", "ENTRYPOINT", "CMD"}
    ignored = (CONTAINERS / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = [
        source
        for name, rest in steps
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert set(copied) == let_in
    assert all((ROOT / source).exists() for source in copied)
    packaged = re.findall(r'"prunecast\.(\w+)', (ROOT / "pyproject.toml").read_text())
    assert set(packaged) <= set(copied)
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert user == "10001:10001"
    assert [name for name, _ in steps].index("USER") > text.count("RUN")
    variables = " ".join(rest for name, rest in steps if name == "ENV")
    for setting in ("FLWR_TELEMETRY_ENABLED=0", "PRUNECAST_PULSE=", "PRUNECAST_STORE=/data/"):
        assert setting in variables


# -- compose --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((CONTAINERS / "compose.yaml").read_text())


def test_compose_names_what_there_is(compose: Any) -> None:
    top = {key for key in compose if not key.startswith("x-")}
    assert top == {"name", "services", "networks", "volumes", "secrets"}
    used: dict[str, set[str]] = {"networks": set(), "volumes": set(), "secrets": set()}
    for name, service in compose["services"].items():
        assert set(service) <= SERVICE, f"{name}: {set(service) - SERVICE}"
        used["networks"] |= set(service["networks"])
        used["secrets"] |= set(service["secrets"])
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                assert (CONTAINERS / source).is_file()
            else:
                used["volumes"].add(source)
            assert target.startswith("/")
        for other in service.get("depends_on", {}):
            assert other in compose["services"]
            assert "healthcheck" in compose["services"][other]
        # a command names secrets that the service has
        named = re.findall(r"/run/secrets/([\w.-]+)", " ".join(service["command"]))
        assert set(named) <= set(service["secrets"]), name
    for kind, names in used.items():
        assert names == set(compose[kind]), kind
    made = {"ca.crt", "server.crt", "server.key", "nodes/node-1", "nodes/node-2"}
    files = {entry["file"].removeprefix("./keys/") for entry in compose["secrets"].values()}
    assert files == made
    assert "deploy/containers/keys/" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_confines_every_service_and_asks_each_how_it_is(compose: Any) -> None:
    for name, service in compose["services"].items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
        assert "privileged" not in service
        if name != "gate":
            assert service["deploy"]["resources"]["limits"]["memory"]
            assert "build" in service
            check_command(service["command"])
            if service["healthcheck"]["test"][1] == "prunecast":
                assert "watch" in service["command"]
    nodes = [s for name, s in compose["services"].items() if name.startswith("supernode")]
    assert len(nodes) == 3
    for service in nodes:
        assert "ports" not in service
        (drain,) = [w for w in service["command"] if w.startswith("--drain=")]
        minutes = int(service["stop_grace_period"].removesuffix("m"))
        assert 60 * minutes > int(drain.partition("=")[2])
        # a node sees its own key and the authority's certificate
        assert len(service["secrets"]) == 2
    gpu = compose["services"]["supernode-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    # whoever reaches the SuperLink's own port may run code on every node
    assert compose["services"]["superlink"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "nodes" not in compose["services"]["superlink"]["networks"]
    assert compose["networks"]["link"]["internal"] is True


# -- kubernetes -----------------------------------------------------------------------------------


def built(folder: str) -> list[dict[str, Any]]:
    """Objects of a kustomization."""
    if kubectl := shutil.which("kubectl"):
        done = subprocess.run(
            [kubectl, "kustomize", str(KUBERNETES / folder)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return [one for one in yaml.safe_load_all(done.stdout) if one]
    if folder == "supernode-gpu":
        pytest.skip("needs kubectl to apply the patches")
    made = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())
    found = [
        one
        for name in made["resources"]
        for one in yaml.safe_load_all((KUBERNETES / folder / name).read_text())
    ]
    for generated in made["configMapGenerator"]:
        lines = [line.partition("=")[::2] for line in generated.get("literals", ())]
        data = {**dict(lines), **dict.fromkeys(generated.get("files", ()), "")}
        found.append({"kind": "ConfigMap", "metadata": {"name": generated["name"]}, "data": data})
    return found


@pytest.fixture(params=["server", "supernode", "supernode-gpu"])
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return built(request.param)


def workloads(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] in ("Deployment", "StatefulSet")]


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_every_object_is_what_kubernetes_takes(objects: list[dict[str, Any]], version: str) -> None:
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)  # unknown fields are refused, too


def test_a_misspelt_field_would_be_seen() -> None:
    [pod] = workloads(built("supernode"))
    pod["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(pod, "1.30", strict=True)


def test_every_reference_leads_somewhere(objects: list[dict[str, Any]]) -> None:
    names = {(one["kind"], one["metadata"]["name"].partition("-g")[0]) for one in objects}
    assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)
    secrets = set(re.findall(r"create secret generic (\S+)", TEXT))
    for one in workloads(objects):
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        pod = one["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claimed = {c["metadata"]["name"] for c in one["spec"].get("volumeClaimTemplates", ())}
        mounted = set()
        for container in pod["containers"]:
            ports = {port["name"] for port in container.get("ports", ())}
            mounted |= {mount["name"] for mount in container["volumeMounts"]}
            for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                for kind in ("httpGet", "tcpSocket"):
                    asked = container.get(probe, {}).get(kind, {})
                    assert asked.get("port") in {None, *ports}
            for entry in container.get("env", ()):
                if "valueFrom" in entry:
                    reference = entry["valueFrom"]["configMapKeyRef"]
                    (found,) = [
                        o["data"]
                        for o in objects
                        if (o["kind"], o["metadata"]["name"]) == ("ConfigMap", reference["name"])
                    ]
                    assert reference["key"] in found
            words = [*container.get("args", ()), *container.get("command", ())]
            known = {entry["name"] for entry in container.get("env", ())}
            assert set(re.findall(r"\$\((\w+)\)", " ".join(words))) <= known
            for path in re.findall(r"(/run/secrets/\w+)/", " ".join(words)):
                assert path in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == set(volumes) | claimed
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
                assert volume["secret"]["defaultMode"] == 0o440
            if "configMap" in volume:
                assert any(
                    o["kind"] == "ConfigMap"
                    and o["metadata"]["name"] == volume["configMap"]["name"]
                    for o in objects
                )
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in names
        if one["kind"] == "StatefulSet":
            assert ("Service", one["spec"]["serviceName"]) in names
    pods = [one["spec"]["template"] for one in workloads(objects)]
    for one in objects:
        if one["kind"] == "Service":
            chosen = _chosen(pods, one["spec"]["selector"])
            for port in one["spec"].get("ports", ()):
                assert port["targetPort"] in chosen
        if one["kind"] == "NetworkPolicy":
            labels = one["spec"]["podSelector"].get("matchLabels")
            if labels:
                ports = [p["port"] for r in one["spec"].get("ingress", ()) for p in r["ports"]]
                assert set(ports) <= _chosen(pods, labels)


def _chosen(pods: list[dict[str, Any]], labels: dict[str, str]) -> set[str]:
    """Names of the ports of the pods that labels choose; there is one at least."""
    found = [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]
    assert found, labels
    return {
        port["name"]
        for pod in found
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
    }


def test_pods_are_restricted_and_say_how_they_are(objects: list[dict[str, Any]]) -> None:
    """As the Pod Security Standard `restricted` has it, which the namespaces enforce."""
    (namespace,) = [one for one in objects if one["kind"] == "Namespace"]
    enforced = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert enforced == "restricted"
    assert workloads(objects)
    for one in workloads(objects):
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
            assert "livenessProbe" in container
            probe = container["livenessProbe"].get("exec", {}).get("command")
            if probe:
                assert probe == ["prunecast", "federation", "health"]
                assert "watch" in container["args"]
                assert "/run/prunecast" in {m["mountPath"] for m in container["volumeMounts"]}
            if container["image"].startswith("prunecast"):
                check_command(container["args"])
            drains = [w for w in container.get("args", ()) if w.startswith("--drain=")]
            if drains:
                longest = pod["terminationGracePeriodSeconds"]
                assert longest > int(drains[0].partition("=")[2]) + 30


def test_a_gpu_is_what_the_overlay_adds() -> None:
    (plain,) = workloads(built("supernode"))
    (with_gpu,) = workloads(built("supernode-gpu"))
    (mine,) = with_gpu["spec"]["template"]["spec"]["containers"]
    (base,) = plain["spec"]["template"]["spec"]["containers"]
    assert mine["resources"]["limits"].pop("nvidia.com/gpu") == 1
    assert mine["env"].pop() == {"name": "CUDA_CACHE_PATH", "value": "/data/cuda"}
    assert mine["image"].endswith("-gpu")
    mine["image"] = base["image"]
    assert with_gpu == plain


def test_operators_of_the_superlink_need_the_cluster_to_let_them_in() -> None:
    objects = built("server")
    (superlink,) = [o for o in workloads(objects) if o["metadata"]["name"] == "superlink"]
    containers = {c["name"]: c for c in superlink["spec"]["template"]["spec"]["containers"]}
    assert "--host=127.0.0.1" in containers["superlink"]["args"]
    policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
    assert policies["nothing"]["podSelector"] == {}
    assert "ingress" not in policies["nothing"]


# -- the documentation ----------------------------------------------------------------------------


def test_files_and_options_named_in_the_documentation_exist() -> None:
    for path in set(re.findall(r"deploy/[\w./@-]+", TEXT)):
        path = path.rstrip("./")
        if "/keys" not in path:
            matches = [*ROOT.glob(path.replace("prunecast-superlink", "prunecast-superlink*"))]
            assert (ROOT / path).exists() or matches, path
    for block in re.findall(r"^```console\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("prunecast "):
                own = line.partition(" -- ")[0]  # another command follows, with its own options
                words = [w for w in shlex.split(own)[1:] if not w.startswith(("/", "run"))]
                assert CliRunner().invoke(app, [*words[:2], "--help"]).exit_code == 0, line
                shown = CliRunner().invoke(app, [*words[:2], "--help"], env={"COLUMNS": "200"})
                for word in words:
                    if word.startswith("--"):
                        assert word in shown.output, line
