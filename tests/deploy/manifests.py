"""What is applied to a cluster, as data: the rendered overlays' objects, their pods, containers and settings.

Where a kubectl is at hand, components that no overlay uses are rendered too, as the overlay `alternatives`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from hiprune.config import ProcessSettings
from services.encoder.settings import Settings as EncoderSettings
from services.gateway.settings import Settings as GatewaySettings
from services.llm.settings import Settings as LanguageModelSettings
from services.pruner.settings import Settings as PrunerSettings
from tools import render_k8s

Object = dict[str, Any]

SETTINGS: Final[Mapping[str, type[ProcessSettings]]] = {
    "encoder": EncoderSettings,
    "pruner": PrunerSettings,
    "llm": LanguageModelSettings,
    "gateway": GatewaySettings,
}
COMMITTED: Final = ("dev-cpu", "production", "single-gpu")
NAME: Final = "app.kubernetes.io/name"

_ALTERNATIVES: Final = """
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - ../../base
components:
  - ../../components/network-policies
  - ../../components/tenants-secret
  - ../../components/tls
  - ../../components/autoscaling/keda
"""
TENANTS: Final = "tenants: {}\n"


def names() -> tuple[str, ...]:
    """The overlays that there are here."""
    return (*COMMITTED, "alternatives") if render_k8s.kubectl() else COMMITTED


@cache
def overlay(name: str) -> list[Object]:
    """An overlay's objects."""
    if name == "alternatives":
        return _alternatives()
    text = (render_k8s.K8S / "rendered" / f"{name}.yaml").read_text("utf-8")
    return list(yaml.safe_load_all(text))


def _alternatives() -> list[Object]:
    program = render_k8s.kubectl()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="k8s-") as folder:
        k8s = Path(folder) / "k8s"
        shutil.copytree(render_k8s.K8S, k8s)
        (k8s / "components/tenants-secret/tenants.yaml").write_text(TENANTS, "utf-8")
        secrets = "".join(f"{key}={key * 3}\n" for key in ("peer-token", "cache-secret", "redis-password"))
        (k8s / "components/tenants-secret/secrets.env").write_text(secrets, "utf-8")
        (k8s / "overlays/alternatives").mkdir()
        (k8s / "overlays/alternatives/kustomization.yaml").write_text(_ALTERNATIVES, "utf-8")
        return list(yaml.safe_load_all(render_k8s.rendered(k8s / "overlays/alternatives", program)))


def of_kind(name: str, *kinds: str) -> dict[str, Object]:
    """An overlay's objects of some kinds, by their names."""
    return {each["metadata"]["name"]: each for each in overlay(name) if each["kind"] in kinds}


def workloads(name: str) -> dict[str, Object]:
    """What makes pods, by name."""
    return of_kind(name, "Deployment", "Job", "StatefulSet", "DaemonSet")


def pod(workload: Object) -> Object:
    """The pods' spec."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def labels(workload: Object) -> dict[str, str]:
    """The pods' labels."""
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


@dataclass(frozen=True)
class Container:
    """A container in its pod."""

    name: str
    spec: Object
    pod: Object
    workload: str

    @property
    def env(self) -> dict[str, Object]:
        """Its variables by name, in their order."""
        return {each["name"]: each for each in self.spec.get("env", ())}

    @property
    def values(self) -> dict[str, str]:
        """Its variables as the process sees them, a secret as a word that names it."""
        seen: dict[str, str] = {}
        for name, variable in self.env.items():
            if "value" in variable:
                value = variable["value"]
                for other, said in seen.items():
                    value = value.replace(f"$({other})", said)
            else:
                reference = variable["valueFrom"]["secretKeyRef"]
                value = f"secret-{reference['name']}-{reference['key']}"
                if reference["key"] == "url":
                    value = f"redis://:{value}@elsewhere:6379/0"
            seen[name] = value
        return seen

    @property
    def settings(self) -> ProcessSettings:
        """What the process makes of them. Raises ConfigError."""
        return SETTINGS[self.name].read([], self.values)

    @property
    def ports(self) -> dict[str, int]:
        """Its ports by name."""
        return {each["name"]: each["containerPort"] for each in self.spec.get("ports", ())}

    @property
    def mounts(self) -> dict[str, Object]:
        """What is mounted, by path."""
        return {each["mountPath"]: each for each in self.spec.get("volumeMounts", ())}

    def volume_at(self, path: str) -> Object:
        """The volume that is mounted there."""
        (found,) = (each for each in self.pod["volumes"] if each["name"] == self.mounts[path]["name"])
        volume: Object = found
        return volume


def containers(name: str) -> Iterator[Container]:
    """Every container of an overlay."""
    for workload, made in workloads(name).items():
        spec = pod(made)
        for each in (*spec.get("initContainers", ()), *spec["containers"]):
            yield Container(each["name"], each, spec, workload)


def services(name: str) -> dict[str, Container]:
    """The containers that run a service of ours, by its name."""
    return {each.name: each for each in containers(name) if each.name in SETTINGS}


def milli(quantity: str | int) -> int:
    """A quantity of Kubernetes', in thousandths: 500m, 2, 1Gi."""
    text = str(quantity)
    for suffix, factor in (("m", 1), ("Mi", 1000 * 2**20), ("Gi", 1000 * 2**30)):
        if text.endswith(suffix):
            return int(text.removesuffix(suffix)) * factor
    return int(text) * 1000
