"""Whether this machine is as it should be: findings of `hiprune doctor`, each with advice. See also `reach`.

Reads an environment that is given, asks nobody, changes nothing. What is not installed is not looked at. No
secret is in any finding.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from hiprune import auth
from hiprune.config import ConfigError, ProcessSettings
from hiprune.trust import Certificates

OK: Final = "ok"
WARNING: Final = "warning"
PROBLEM: Final = "problem"

SERVICES: Final = ("encoder", "pruner", "llm", "gateway")
CLIENT_VARIABLES: Final = frozenset(
    f"HIPRUNE_{name}"
    for name in (
        *("ADDRESS", "PRUNER_ADDRESS", "ENCODER_ADDRESS", "GATEWAY_ADDRESS"),
        *("KEY", "TLS_CA", "TLS_CERT", "TLS_KEY", "TENANTS"),
    )
)
"""What the commands read."""
DEPLOY_VARIABLES: Final = frozenset(
    f"HIPRUNE_{name}"
    for name in (
        *("VERSION", "MODEL", "MODELS", "PORT", "HTTP_PORT", "CACHE_SECRET", "OTLP", "BUILD_NETWORK", "FUZZ"),
        *("ENCODER_MEMORY", "PRUNER_MEMORY", "LLM_MEMORY", "GATEWAY_MEMORY", "REDIS_MEMORY", "REDIS_LIMIT"),
        *("ENCODER_GPU_SHARE", "LLM_GPU_SHARE", "GRAFANA_PORT", "JAEGER_PORT", "PROMETHEUS_PORT"),
    )
)
"""What docker-compose.yml, the Makefile and deploy/ read."""

_EXPIRES_DAYS: Final = 14
_LEAST_SHM: Final = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What: python, settings, llm, redis, gpu, …"""
    status: str
    """ok, warning or problem."""
    message: str
    advice: str = ""
    """What to do; empty where nothing is."""

    def content(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


# --- this machine ------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """The interpreter, and what is installed against what this package asks for."""
    said = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("python", OK, said)
    try:
        version, asked = importlib.metadata.version("hiprune"), importlib.metadata.requires("hiprune") or ()
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "packages", WARNING, "hiprune is not installed, but lies on the path", "pip install -e ."
        )
        return
    wrong, found = [], []
    for line in asked:
        name = re.match(r"[\w.-]+", line)
        if name is None or ("extra ==" in line and not _is_there(name.group())):
            continue  # of an extra that is not installed
        try:
            there = importlib.metadata.version(name.group())
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name.group()} is missing")
            continue
        if not _satisfies(line, there):
            wrong.append(f"{line.partition(';')[0].strip()} is asked for, {there} is installed")
        elif name.group() in ("grpcio", "protobuf", "torch", "transformers", "vllm"):
            found.append(f"{name.group()} {there}")
    if wrong:
        yield Finding("packages", PROBLEM, "; ".join(wrong), "pip install -c constraints.txt -e '.[…]'")
    else:
        yield Finding("packages", OK, ", ".join([f"hiprune {version}", *dict.fromkeys(found)]))


def check_gpu() -> Iterator[Finding]:
    """What torch sees of a GPU; nothing where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            said = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
            if free < total / 10:
                yield Finding("gpu", WARNING, said, "nvidia-smi says who holds its memory")
            else:
                yield Finding("gpu", OK, said)
    elif shutil.which("nvidia-smi"):
        built = torch.version.cuda
        why = (
            f"torch {torch.__version__}, built for CUDA {built}, sees none"
            if built
            else f"torch {torch.__version__} is a build for CPUs"
        )
        yield Finding(
            "gpu", WARNING, f"nvidia-smi is here, and {why}", "install torch for this driver's CUDA"
        )
    else:
        yield Finding("gpu", OK, "none; models run on the CPU")


def check_shared_memory(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Room in the directory through which large answers go from encoder to pruner."""
    folder = environ.get("HIPRUNE_ENCODER_SHARED_MEMORY_DIR", "/dev/shm")  # noqa: S108  # looked at only
    if not folder:
        return
    try:
        room = os.statvfs(folder)
    except OSError as error:
        yield Finding(
            "shared memory",
            WARNING,
            f"{folder}: {error.strerror}",
            "large answers go through the socket, which is slower: mount it, or set shared_memory_dir",
        )
        return
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    said = f"{folder}: {free / 2**20:.0f} of {total / 2**20:.0f} MiB free"
    if free < _LEAST_SHM:
        advice = "where it is full, large answers go through the socket: docker run --shm-size=1g"
        yield Finding("shared memory", WARNING, said, advice)
    else:
        yield Finding("shared memory", OK, said)


# --- settings and files ------------------------------------------------------------------------------------


def check_settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Every HIPRUNE_ variable: known, and read as its service would read it."""
    classes = dict(_settings_classes())
    known = {*CLIENT_VARIABLES, *DEPLOY_VARIABLES}
    for kind in classes.values():
        known |= {f"{kind.env_prefix}{name.upper()}" for name in kind.model_fields}
    given = sorted(name for name in environ if name.startswith("HIPRUNE_"))
    for name in given:
        owner = name.removeprefix("HIPRUNE_").partition("_")[0].lower()
        if name in known or (owner in SERVICES and owner not in classes):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]}?" if close else "docs/operations.md lists every setting"
        yield Finding("settings", WARNING, f"{name} is no setting", advice)
    for service, kind in classes.items():
        try:
            kind.read([], environ)
        except ConfigError as error:
            for each in str(error).split("; "):
                yield Finding("settings", PROBLEM, f"{service}: {each}", "correct it, or unset it")
        else:
            count = sum(f"{kind.env_prefix}{name.upper()}" in environ for name in kind.model_fields)
            said = f"{service}: {count} set" if count else f"{service}: as they come"
            yield Finding("settings", OK, said)


def check_key(key: str) -> Iterator[Finding]:
    """The key that the commands send; nothing where there is none."""
    if not key:
        return
    if auth.can_be_sent(key):
        yield Finding("key", OK, "is set")
    else:
        said = "holds characters that no key has, a newline or an accent for example"
        yield Finding("key", PROBLEM, said, "copy it again; `hiprune tenant key NAME` makes a new one")


def check_tls(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The certificates that the commands and the services are told to use."""
    for owner in ("", *(f"{service.upper()}_" for service in SERVICES)):
        names = {part: f"HIPRUNE_{owner}TLS_{part}" for part in ("CERT", "KEY", "CA")}
        files = {part: environ.get(name, "") for part, name in names.items()}
        if not any(files.values()):
            continue
        check = f"tls {owner.strip('_').lower() or 'client'}"
        if bool(files["CERT"]) != bool(files["KEY"]):
            missing = names["KEY" if files["CERT"] else "CERT"]
            yield Finding(check, PROBLEM, f"{missing} is empty", "a certificate and its key go together")
            continue
        try:
            Certificates(files["CERT"], files["KEY"], files["CA"])
        except ConfigError as error:
            yield Finding(check, PROBLEM, str(error), f"see {', '.join(names.values())}")
            continue
        for part in ("CERT", "CA"):
            if files[part]:
                yield _expiry(check, Path(files[part]))


def _expiry(check: str, path: Path) -> Finding:
    """Until when the first certificate of a file holds."""
    try:
        from cryptography import x509
    except ImportError:
        return Finding(check, OK, f"{path}: can be read")
    try:
        certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError, IndexError) as error:
        return Finding(check, PROBLEM, f"{path}: {error}", "expected certificates in PEM")
    now = datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    said = f"{path}: holds until {ends:%Y-%m-%d}"
    if ends <= now:
        return Finding(check, PROBLEM, f"{path}: ended {ends:%Y-%m-%d}", "renew it; services read it again")
    if begins > now:
        return Finding(check, PROBLEM, f"{path}: begins {begins:%Y-%m-%d}", "is this machine's clock right?")
    if (ends - now).days < _EXPIRES_DAYS:
        return Finding(check, WARNING, said, "renew it; services read it again by themselves")
    return Finding(check, OK, said)


# --- helpers -----------------------------------------------------------------------------------------------


def _settings_classes() -> Iterator[tuple[str, type[ProcessSettings]]]:
    """The settings of the services that are installed: what is installed is not known to this package."""
    for service in SERVICES:
        try:
            module = importlib.import_module(f"services.{service}.settings")
        except ImportError:
            continue
        yield service, module.Settings


def _is_there(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _satisfies(requirement: str, version: str) -> bool:
    """Whether a version is what a requirement asks for; true where that cannot be told."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)
