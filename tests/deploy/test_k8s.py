"""Claims about the manifests in deploy/k8s: what no schema says. Reads rendered overlays; needs no cluster.

Where a kubectl is at hand they are rendered again and compared; elsewhere their sources' digest is.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import redis
import yaml
from huggingface_hub import snapshot_download
from kubernetes_validate import utils as schemas
from pydantic import SecretStr
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from hiprune.config import ConfigError
from hiprune.stack import find_redis, free_port
from hiprune.telemetry import names as telemetry
from tests.deploy import manifests
from tests.deploy.manifests import NAME, Container, Object, containers, milli, of_kind, overlay, workloads
from tools import render_k8s

VERSIONS = ("1.36", "1.37")
CUSTOM = {"Issuer", "Certificate", "PodMonitor", "ScaledObject"}
"""Kinds that other projects define: no schema of Kubernetes' own has them."""
NOT_OURS = {"REDIS_PASSWORD", "REDISCLI_AUTH", "HF_HUB_OFFLINE"}
"""Variables of others that services have: one that a URL is put together with, Redis', the hub's."""
MARGIN_S = 15
"""What a pod has beyond its hooks and its drain, to end."""

every_overlay = pytest.mark.parametrize("name", manifests.names())


def key(thing: Object) -> tuple[str, ...]:
    """What tells one object from another."""
    meta = thing["metadata"]
    return thing["apiVersion"], thing["kind"], meta.get("namespace", ""), meta["name"]


def test_the_rendered_manifests_are_what_the_overlays_make() -> None:
    assert tuple(render_k8s.overlays()) == manifests.COMMITTED
    program = render_k8s.kubectl()
    for name in manifests.COMMITTED:
        path = render_k8s.K8S / "rendered" / f"{name}.yaml"
        assert path.read_text("utf-8").startswith(render_k8s.head()), "python tools/render_k8s.py"
        if program:
            made = yaml.safe_load_all(render_k8s.rendered(render_k8s.K8S / "overlays" / name, program))
            assert {key(each): each for each in made} == {key(each): each for each in overlay(name)}
    assert not list((render_k8s.K8S / "rendered").glob("*.yml"))


@pytest.fixture(scope="module")
def read_once() -> Iterator[None]:
    """Keeps the schemas that were read: a version's are megabytes, and asked for by each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "schema_contents", cache(schemas.schema_contents))
        yield


@every_overlay
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("read_once")
def test_every_object_is_valid(name: str, version: str) -> None:
    for each in overlay(name):
        if each["kind"] not in CUSTOM:
            assert schemas.validate(each, version, strict=True) == version
    assert len({key(each) for each in overlay(name)}) == len(overlay(name))


@every_overlay
def test_every_pod_is_restricted_as_its_namespace_demands(name: str) -> None:
    (namespace,) = of_kind(name, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in workloads(name).values():
        spec = manifests.pod(workload)
        assert workload["metadata"]["namespace"] == namespace["metadata"]["name"]
        context = spec["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (65532, 65532, 65532)
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False, "would set variables by names of services"
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
        assert all({"hostPath"}.isdisjoint(volume) for volume in spec["volumes"])
    for container in containers(name):
        assert container.spec["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "emptyDir" in container.volume_at("/tmp")
        assert not any("hostPort" in port for port in container.spec.get("ports", ()))


@every_overlay
def test_every_image_has_a_version_and_ours_has_this_projects(name: str) -> None:
    project = tomllib.loads((render_k8s.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for container in containers(name):
        repository, _, tag = container.spec["image"].rpartition(":")
        assert repository, container.spec["image"]
        assert tag != "latest"
        if repository.startswith("hiprune/"):
            assert tag.removesuffix("-cuda") == project["version"]


@every_overlay
def test_every_variable_is_a_setting_and_the_process_takes_them(name: str) -> None:
    found = manifests.services(name)
    assert found.keys() == manifests.SETTINGS.keys()
    for container in containers(name):
        settings = manifests.SETTINGS.get(container.name)
        prefix = settings.env_prefix if settings else "HIPRUNE_"
        fields = settings.model_fields if settings else {}
        for variable in container.env:
            known = variable.startswith(prefix) and variable.removeprefix(prefix).lower() in fields
            assert known or variable in NOT_OURS or container.name == "fetch", (container.name, variable)
    for container in found.values():
        assert container.settings  # raises ConfigError


@every_overlay
def test_no_secret_stands_in_a_manifest(name: str) -> None:
    assert name == "alternatives" or not of_kind(name, "Secret")
    for container in containers(name):
        settings = manifests.SETTINGS.get(container.name)
        fields = settings.model_fields if settings else {}
        for variable, said in container.env.items():
            own = variable.removeprefix(settings.env_prefix).lower() if settings else ""
            is_secret = own in fields and fields[own].annotation is SecretStr
            if is_secret or variable in {"REDIS_PASSWORD", "REDISCLI_AUTH", "HF_TOKEN"}:
                given = said.get("valueFrom", {}).get("secretKeyRef", {"optional": True})
                composed = re.fullmatch(r"redis://:\$\(REDIS_PASSWORD\)@redis:6379/0", said.get("value", ""))
                assert composed or not given.get("optional", False), (container.name, variable)
        said = " ".join(map(str, (*container.spec.get("command", ()), *container.spec.get("args", ()))))
        assert not re.search(r"(?i)(password|token|secret)=\S", said)
    assert "hiprune-tenants" in str(overlay(name)) or name == "dev-cpu"


def test_the_secrets_that_pods_name_are_those_that_the_component_makes() -> None:
    component = render_k8s.K8S / "components" / "tenants-secret"
    made = yaml.safe_load((component / "kustomization.yaml").read_text("utf-8"))["secretGenerator"]
    ignored = (component / ".gitignore").read_text("utf-8").split()
    for each in made:
        assert each["options"] == {"disableNameSuffixHash": True}
        assert set(each.get("files", ()) or each.get("envs", ())) <= set(ignored)
    said = "\n".join(path.read_text("utf-8") for path in component.rglob("kustomization.yaml"))
    used = {
        (reference["name"], reference["key"])
        for container in containers("single-gpu")
        for variable in container.env.values()
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    assert {name for name, _ in used} == {"hiprune-secrets", "hiprune-hub"}
    assert all(word in said for name, word in used if name == "hiprune-secrets")


# --- who may come in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["production", "single-gpu"])
def test_nothing_starts_without_the_tenants_secret(name: str) -> None:
    llm = manifests.services(name)["llm"]
    folder, _, file = llm.values["HIPRUNE_LLM_TENANTS"].rpartition("/")
    secret = llm.volume_at(folder)["secret"]
    # Kubernetes: a pod is not created before each of its volumes is there, unless it says `optional`
    assert secret == {"secretName": "hiprune-tenants", "defaultMode": 0o440}
    assert file == "tenants.yaml"
    assert "subPath" not in llm.mounts[folder], "a file that is mounted alone never changes"
    # and were the volume taken away, the process would say so and end
    without = {key: value for key, value in llm.values.items() if key != "HIPRUNE_LLM_TENANTS"}
    with pytest.raises(ConfigError, match="no tenants are configured"):
        manifests.SETTINGS["llm"].read([], without)
    pruner = manifests.services(name)["pruner"]
    without = {
        key: value for key, value in pruner.values.items() if "PEER_TOKEN" not in key and "TLS" not in key
    }
    with pytest.raises(ConfigError, match="no tenants are configured"):
        manifests.SETTINGS["pruner"].read([], without)


def test_anonymous_callers_are_served_behind_policies_alone() -> None:
    for name in manifests.names():
        served = [each for each in manifests.services(name).values() if each.settings.allow_anonymous]
        assert bool(served) is (name == "dev-cpu")
        assert of_kind(name, "NetworkPolicy")["nobody"]["spec"] == {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
        }


def matches(selector: Object, found: dict[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    wanted = selector.get("matchLabels", {}).items()
    listed = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in listed)
    return all(found.get(label) == value for label, value in wanted) and all(
        found.get(each["key"]) in each["values"] for each in listed
    )


def ways(name: str) -> set[tuple[str, str, int]]:
    """Who may open a connection to whom and at which port, by policies on both sides."""
    pods = {workload: manifests.labels(made) for workload, made in workloads(name).items()}
    leaves: set[tuple[str, str, int]] = set()
    enters: set[tuple[str, str, int]] = set()
    for policy in of_kind(name, "NetworkPolicy").values():
        chosen = [each for each, found in pods.items() if matches(policy["spec"]["podSelector"], found)]
        for side, other, into in (("egress", "to", leaves), ("ingress", "from", enters)):
            for rule in policy["spec"].get(side, ()):
                for peer in rule[other]:
                    if "podSelector" in peer and "namespaceSelector" not in peer:
                        far = [each for each, found in pods.items() if matches(peer["podSelector"], found)]
                    else:
                        label = peer.get("namespaceSelector", {}).get("matchLabels", {})
                        far = list(label) or [peer["ipBlock"]["cidr"]]
                    for port in rule["ports"]:
                        into |= {
                            (near, there, port["port"]) if side == "egress" else (there, near, port["port"])
                            for near in chosen
                            for there in far
                        }
    inside = {way for way in leaves & enters if way[0] in pods and way[1] in pods}
    half = {way for way in leaves ^ enters if way[0] in pods and way[1] in pods}
    assert not half, f"allowed on one side alone: {half}"
    return inside | {way for way in leaves | enters if not (way[0] in pods and way[1] in pods)}


@every_overlay
def test_policies_let_through_what_the_services_need_and_nothing_else(name: str) -> None:
    clients, telemetry_label, dns = (
        "hiprune.dev/clients",
        "hiprune.dev/telemetry",
        "kubernetes.io/metadata.name",
    )
    expected = {
        (clients, "gateway", 8080),
        (clients, "llm", 50053),
        ("gateway", "llm", 50053),
        ("llm", "vision", 50052),
    }
    if "redis" in workloads(name):
        expected |= {("vision", "redis", 6379), ("llm", "redis", 6379)}
    if name == "production":
        expected |= {("vision", "10.0.0.0/8", 6379), ("llm", "10.0.0.0/8", 6379)}
    if "fetch-model" in workloads(name):
        expected |= {("fetch-model", "0.0.0.0/0", 443)}
    for each in workloads(name):
        expected |= {(each, dns, 53), (each, "169.254.20.10/32", 53)}
        if each in {"vision", "llm", "gateway"}:
            expected |= {(each, telemetry_label, 4317)}
            expected |= {(telemetry_label, each, 9464), (telemetry_label, each, 9465)}
    assert ways(name) == expected


# --- who finds whom --------------------------------------------------------------------------------------


@every_overlay
def test_selectors_choose_the_pods_that_they_mean_and_ports_exist(name: str) -> None:
    made = workloads(name)
    for each, workload in made.items():
        if workload["kind"] == "Deployment":
            assert matches(workload["spec"]["selector"], manifests.labels(workload))
            for spread in manifests.pod(workload).get("topologySpreadConstraints", ()):
                assert matches(spread["labelSelector"], manifests.labels(workload))
        assert manifests.labels(workload)[NAME] == each
    for each, service in of_kind(name, "Service").items():
        (workload,) = (
            each
            for each, one in made.items()
            if matches({"matchLabels": service["spec"]["selector"]}, manifests.labels(one))
        )
        ports = {k: v for one in containers(name) if one.workload == workload for k, v in one.ports.items()}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], (each, port)
    for each, budget in of_kind(name, "PodDisruptionBudget").items():
        assert [
            one for one, w in made.items() if matches(budget["spec"]["selector"], manifests.labels(w))
        ] == [each]
    for workload in {each.workload for each in containers(name)}:
        ports = [port for one in containers(name) if one.workload == workload for port in one.ports.values()]
        assert len(ports) == len(set(ports)), "containers of a pod share its ports"
    for monitor in of_kind(name, "PodMonitor").values():
        ports = {port for one in containers(name) for port in one.ports}
        assert {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]} == {
            port for port in ports if port.startswith("metrics")
        }
        # dashboards and alerts ask for jobs by the names that deploy/prometheus gives them
        scraped = yaml.safe_load((render_k8s.ROOT / "deploy/prometheus/prometheus.yaml").read_text("utf-8"))
        jobs = {each["job_name"] for each in scraped["scrape_configs"]}
        assert {f"hiprune-{each}" for each in manifests.SETTINGS} <= jobs
        for each in monitor["spec"]["podMetricsEndpoints"]:
            assert each["relabelings"] == [
                {
                    "sourceLabels": ["__meta_kubernetes_pod_container_name"],
                    "targetLabel": "job",
                    "replacement": "hiprune-$1",
                }
            ]


@every_overlay
def test_services_listen_where_their_callers_look(name: str) -> None:
    found, addresses = manifests.services(name), of_kind(name, "Service")
    for each, container in found.items():
        settings = container.settings
        main = {"gateway": "http"}.get(each, "grpc")
        if not settings.listen.startswith("unix:"):
            assert settings.listen == f"0.0.0.0:{container.ports[main]}"
        (metrics,) = (port for label, port in container.ports.items() if label.startswith("metrics"))
        assert settings.metrics_listen == f"0.0.0.0:{metrics}"
    for each, hop in (("llm", "pruner"), ("gateway", "llm")):
        host, _, port = getattr(found[each].settings, hop).rpartition(":")
        assert addresses[host]["spec"]["ports"][0]["port"] == int(port)
        # gRPC's own balancing needs to see the pods: an address of the service's own would pin it to one
        assert addresses[host]["spec"]["clusterIP"] == "None"
    for container in found.values():
        for url in re.findall(r"redis://:[^@]*@redis:(\d+)", " ".join(container.values.values())):
            assert addresses["redis"]["spec"]["ports"][0]["port"] == int(url)
    assert ("redis" in addresses) is (name in {"single-gpu", "alternatives"})


# --- starting and ending ---------------------------------------------------------------------------------


def asks(probe: Object, container: Container) -> str | None:
    """What a probe asks health for; None for one that asks something else."""
    if "grpc" in probe:
        assert probe["grpc"]["port"] == container.ports["grpc"]
        assert not container.settings.tls_cert, "the kubelet's own speak no TLS"
        service: str = probe["grpc"]["service"]
        return service
    if "exec" in probe:
        command = probe["exec"]["command"]
        assert command[:4] == ["python", "-m", "hiprune.health", container.name]
        assert len(command) <= 5
        return "".join(command[4:])
    return None


@every_overlay
def test_probes_ask_for_life_to_restart_and_for_readiness_to_route(name: str) -> None:
    for container in manifests.services(name).values():
        probes = [container.spec[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")]
        if container.name == "gateway":
            assert [each["httpGet"]["path"] for each in probes] == ["/healthz", "/healthz", "/readyz"]
            scheme = "HTTPS" if container.settings.tls_cert else "HTTP"
            assert {each["httpGet"].get("scheme", "HTTP") for each in probes} == {scheme}
            assert {container.ports[each["httpGet"]["port"]] for each in probes} == {8080}
        else:
            assert [asks(each, container) for each in probes] == ["liveness", "liveness", ""]
        startup, liveness, readiness = probes
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 60, "torch takes its time to import"
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30
        assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 20
        for each in (startup, liveness):
            assert each["terminationGracePeriodSeconds"] <= 10, "what hangs does not drain"
    for container in containers(name):
        assert (
            container.name == "fetch"
            or {"startupProbe", "livenessProbe", "readinessProbe"} <= container.spec.keys()
        )


@every_overlay
def test_the_pruner_is_a_sidecar_that_starts_first_and_waits_for_nobody(name: str) -> None:
    spec = manifests.pod(workloads(name)["vision"])
    (pruner,), (encoder,) = spec["initContainers"], spec["containers"]
    assert (pruner["name"], pruner["restartPolicy"], encoder["name"]) == ("pruner", "Always", "encoder")
    found = manifests.services(name)
    assert asks(pruner["startupProbe"], found["pruner"]) == "liveness", "the encoder starts when this is so"
    assert found["encoder"].settings.listen == getattr(found["pruner"].settings, "encoder")  # noqa: B009
    for path, least in (
        ("/run/hiprune", 0),
        (found["encoder"].values.get("HIPRUNE_ENCODER_SHARED_MEMORY_DIR", "/dev/shm"), 2**29),
    ):
        volumes = [found[each].volume_at(path) for each in ("pruner", "encoder")]
        assert volumes[0] == volumes[1]
        assert volumes[0]["emptyDir"]["medium"] == "Memory"
        assert milli(volumes[0]["emptyDir"]["sizeLimit"]) // 1000 > least
    assert found["encoder"].settings.listen.startswith("unix:/run/hiprune/")


@every_overlay
def test_the_encoder_outlives_the_last_call_of_its_pruner(name: str) -> None:
    """In the order in which the kubelet ends a pod: tests/chaos/test_pods.py has it with processes."""
    found = manifests.services(name)
    pruner, encoder = found["pruner"].spec, found["encoder"].spec
    flock, wait, lock, *command = pruner["command"]
    assert (flock, wait, command) == ("flock", "--no-fork", ["python", "-m", "services.pruner"])
    assert (
        found["pruner"].mounts[str(Path(lock).parent)]["name"]
        == found["encoder"].mounts[str(Path(lock).parent)]["name"]
    )
    assert "os.kill(1, signal.SIGTERM)" in pruner["lifecycle"]["preStop"]["exec"]["command"][-1]
    told, option, seconds, waited, then = encoder["lifecycle"]["preStop"]["exec"]["command"]
    assert (told, option, waited, then) == ("flock", "--wait", lock, "true")
    assert int(seconds) * 1000 > found["pruner"].settings.drain_ms
    for probe in ("startupProbe", "livenessProbe"):
        assert encoder[probe]["terminationGracePeriodSeconds"] <= 10, (
            "or a hung one waits for a healthy pruner"
        )


@every_overlay
def test_no_request_is_cut_off_by_an_upgrade(name: str) -> None:
    found = manifests.services(name)
    for container in found.values():
        settings = container.settings
        # the encoder's one caller has ended before it is told to
        if container.name != "encoder":
            assert settings.max_deadline_ms <= settings.drain_ms, "an answer may take longer than the drain"
        hook = container.spec["lifecycle"]["preStop"]
        before_s = hook["sleep"]["seconds"] if "sleep" in hook else 0
        if container.name == "encoder":
            before_s = int(hook["exec"]["command"][2])
        needs_s = before_s + settings.drain_ms / 1000 + MARGIN_S
        assert container.pod["terminationGracePeriodSeconds"] >= needs_s, container.name
    budgets = of_kind(name, "PodDisruptionBudget")
    for each in ("vision", "llm", "gateway"):
        spec = workloads(name)[each]["spec"]
        if spec["strategy"]["type"] == "Recreate":
            assert name == "single-gpu"
            assert each != "gateway"
            assert "rollingUpdate" not in spec["strategy"]
            continue
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert budgets[each]["spec"]["maxUnavailable"] == 1
        # gRPC asks DNS for new pods every 30 s at most, and DNS may have cached for 30 s
        if each != "gateway" and name != "dev-cpu":
            assert spec["minReadySeconds"] >= 60


# --- what they take --------------------------------------------------------------------------------------


@every_overlay
def test_pods_say_what_they_need_and_how_much_they_matter(name: str) -> None:
    classes = of_kind(name, "PriorityClass")
    for container in containers(name):
        assert container.pod["priorityClassName"] in classes
        assert container.pod["serviceAccountName"] in of_kind(name, "ServiceAccount")
        needs, most = container.spec["resources"]["requests"], container.spec["resources"]["limits"]
        assert milli(needs["cpu"]) > 0
        # a limit on processor time would stop every thread for the rest of each tenth of a second
        assert "cpu" not in most
        assert milli(needs["memory"]) <= milli(most["memory"])
        in_memory = sum(
            milli(container.volume_at(path)["emptyDir"].get("sizeLimit", 0))
            for path in container.mounts
            if container.volume_at(path).get("emptyDir", {}).get("medium") == "Memory"
        )
        assert in_memory * 3 // 2 <= milli(most["memory"]), "what lies in memory counts to whoever wrote it"
        if container.name in {"encoder", "llm", "pruner"}:
            assert container.settings.threads, "torch would count the machine's cores"


def test_redis_has_room_beside_what_it_keeps() -> None:
    config = (render_k8s.K8S / "base" / "redis.conf").read_text("utf-8")
    (kept,) = re.findall(r"^maxmemory (\d+)gb$", config, flags=re.MULTILINE)
    (redis,) = (each for each in containers("single-gpu") if each.name == "redis")
    assert milli(redis.spec["resources"]["limits"]["memory"]) // 1000 >= int(kept) * 2**30 * 1.4
    assert re.search(r"^maxmemory-policy allkeys-lru$", config, flags=re.MULTILINE)


def test_redis_starts_by_its_command_and_wants_the_password(tmp_path: Path) -> None:
    (container,) = (each for each in containers("single-gpu") if each.name == "redis")
    (config,) = (
        each["data"]["redis.conf"]
        for each in of_kind("single-gpu", "ConfigMap").values()
        if "redis.conf" in each["data"]
    )
    port, program = free_port(), find_redis()
    assert program is not None
    (tmp_path / "redis.conf").write_text(
        config.replace("6379", str(port)).replace("/tmp", str(tmp_path)), "utf-8"
    )
    command = [word.replace("/etc/redis", str(tmp_path)) for word in container.spec["command"]]
    environ = {"PATH": f"{program.parent}:{os.defpath}", "REDISCLI_AUTH": "the password"}
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        retry = Retry(ConstantBackoff(0.05), 100)
        right = redis.Redis(port=port, password="the password", retry=retry)
        assert right.ping()
        assert right.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
        assert right.config_get("save") == {"save": ""}
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        # the first process of the container is Redis, which ends when it is told to
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_one_gpu_is_shared_by_two_that_know_their_part_of_it() -> None:
    found = manifests.services("single-gpu")
    shares = [
        found["encoder"].settings.gpu_memory_fraction,
        found["llm"].settings.gpu_memory_utilization,
    ]
    assert all(share > 0 for share in shares)
    assert sum(shares) <= 0.95
    users = [
        each for each in containers("single-gpu") if "nvidia.com/gpu" in each.spec["resources"]["limits"]
    ]
    assert {each.name for each in users} == {"encoder", "llm"}
    sliced = yaml.safe_load(of_kind("single-gpu", "ConfigMap")["hiprune-time-slicing"]["data"]["any"])
    (resource,) = sliced["sharing"]["timeSlicing"]["resources"]
    assert resource == {"name": "nvidia.com/gpu", "replicas": len(users)}
    for each in users:
        assert each.spec["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert workloads("single-gpu")[each.workload]["spec"]["replicas"] == 1


@pytest.mark.parametrize("name", ["production", "single-gpu"])
def test_a_gpu_image_runs_where_a_gpu_is_and_nowhere_else(name: str) -> None:
    for container in containers(name):
        wants = "nvidia.com/gpu" in container.spec["resources"]["limits"]
        if container.name != "fetch":
            assert container.spec["image"].endswith("-cuda") is wants
        if wants:
            assert container.settings.device == "cuda"
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in container.pod[
                "tolerations"
            ]


@pytest.mark.parametrize("name", ["production", "single-gpu"])
def test_a_model_is_fetched_once_by_a_job_and_only_read_by_the_services(name: str) -> None:
    job = workloads(name)["fetch-model"]
    (fetch,) = (each for each in containers(name) if each.name == "fetch")
    # the hub's own function, called as the Job's words call it
    python, option, words = fetch.spec["command"]
    assert (python, option) == ("python", "-c")
    with pytest.MonkeyPatch.context() as patch:
        fake = create_autospec(snapshot_download)
        patch.setattr("huggingface_hub.snapshot_download", fake)
        for variable in ("MODEL", "REVISION"):
            patch.setenv(variable, fetch.values[variable])
        exec(words, {})
    (repository,), asked = fake.call_args
    assert repository == fetch.values["MODEL"]
    assert asked["revision"] == fetch.values["REVISION"]
    endings = {pattern.removeprefix("*.") for pattern in asked["allow_patterns"]}
    assert endings == {"safetensors", "json", "model", "jinja", "txt"}, "nothing that is code"
    assert fetch.env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "hiprune-hub"
    assert "readOnly" not in fetch.mounts["/models"]
    claim = fetch.volume_at("/models")["persistentVolumeClaim"]["claimName"]
    assert claim in of_kind(name, "PersistentVolumeClaim")
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    for each in ("encoder", "pruner", "llm"):
        container = manifests.services(name)[each]
        settings: Any = container.settings
        assert settings.model == asked["local_dir"]
        assert container.mounts["/models"]["readOnly"] is True
        assert container.volume_at("/models")["persistentVolumeClaim"] == {
            "claimName": claim,
            "readOnly": True,
        }


@every_overlay
def test_nothing_is_fetched_at_run_time(name: str) -> None:
    for each, container in manifests.services(name).items():
        assert each == "gateway" or container.values["HF_HUB_OFFLINE"] == "1"


# --- scaling, TLS ----------------------------------------------------------------------------------------


@every_overlay
def test_autoscalers_ask_for_metrics_that_exist_and_own_the_number_of_pods(name: str) -> None:
    scalers = of_kind(name, "HorizontalPodAutoscaler", "ScaledObject")
    assert set(scalers) == ({"vision", "llm"} if name in {"production", "alternatives"} else set())
    series = telemetry.prometheus_series()
    for each, scaler in scalers.items():
        spec = scaler["spec"]
        assert spec["scaleTargetRef"]["name"] == each
        assert "replicas" not in workloads(name)[each]["spec"]
        if scaler["kind"] == "ScaledObject":
            asked = [trigger["metadata"]["query"] for trigger in spec["triggers"]]
            found = [
                re.fullmatch(r'sum\((\w+)\{namespace="hiprune",queue="(\w+)"\}\)', query) for query in asked
            ]
            pairs: list[Any] = [match.groups() if match else None for match in found]
            assert spec["minReplicaCount"] >= 2
        else:
            metrics = [metric["pods"]["metric"] for metric in spec["metrics"]]
            pairs = [(metric["name"], metric["selector"]["matchLabels"]["queue"]) for metric in metrics]
            assert spec["minReplicas"] >= 2
        for metric, queue in pairs:
            assert "queue" in series[metric]
            assert queue in telemetry.QUEUES
    for each in ("vision", "llm", "gateway"):
        if each not in scalers:
            assert workloads(name)[each]["spec"]["replicas"] >= 1


@pytest.mark.parametrize(
    "name", [each for each in ("production", "alternatives") if each in manifests.names()]
)
def test_certificates_are_for_the_names_by_which_services_are_called(name: str) -> None:
    certificates = of_kind(name, "Certificate")
    by_secret = {each["spec"]["secretName"]: each["spec"] for each in certificates.values()}
    issuers = of_kind(name, "Issuer")
    assert all(each["issuerRef"]["name"] in issuers for each in by_secret.values())
    assert issuers["authority"]["spec"]["ca"]["secretName"] in by_secret
    for each, service in (("llm", "llm"), ("pruner", "pruner"), ("gateway", "gateway")):
        container = manifests.services(name)[each]
        settings = container.settings
        for file, expected in (
            (settings.tls_cert, "tls.crt"),
            (settings.tls_key, "tls.key"),
            (settings.tls_ca, "ca.crt"),
        ):
            folder, _, base = file.rpartition("/")
            assert base == expected
            spec = by_secret[container.volume_at(folder)["secret"]["secretName"]]
            assert service in spec["dnsNames"]
            assert set(spec["usages"]) == {"server auth", "client auth"}
        (port,) = of_kind(name, "Service")[service]["spec"]["ports"]
        assert port["appProtocol"] == "https"
    assert manifests.services(name)["pruner"].settings.tls_client_auth


@every_overlay
def test_traces_go_to_a_collector_where_the_component_is_used(name: str) -> None:
    endpoints = {each.settings.otlp_endpoint for each in manifests.services(name).values()}
    assert endpoints == ({"collector.observability:4317"} if name == "production" else {""})
