"""What the Dockerfiles and the Compose files promise, read from the files: needs no Docker, starts nothing.

That it also runs is for `deploy/smoke.sh` to show.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import fill_image

ROOT = Path(__file__).resolve().parents[2]
SERVICES = sorted(path.parent.name for path in (ROOT / "services").glob("*/Dockerfile"))
WITH_MODEL = sorted(fill_image.WITH_MODEL)
PORTS = {"encoder": "50051", "pruner": "50052", "llm": "50053", "gateway": "8080"}
USER = "65532:65532"


# --- Dockerfiles -----------------------------------------------------------------------------------------


def instructions(service: str) -> list[tuple[str, str]]:
    """(NAME, the rest) of each instruction, comments dropped and continued lines joined."""
    text = (ROOT / "services" / service / "Dockerfile").read_text("utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [
        (name.upper(), " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages(service: str) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first; what stands before the first FROM left out."""
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions(service):
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


def last(service: str, name: str) -> list[str]:
    """Every instruction of that name in the stage that becomes the image."""
    return [rest for each, rest in stages(service)[-1] if each == name]


def test_every_service_has_an_image() -> None:
    services = {path.parent.name for path in (ROOT / "services").glob("*/__main__.py")}
    assert set(WITH_MODEL) <= set(SERVICES) <= services


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_is_built_on_one_base_pinned_by_an_argument(service: str) -> None:
    before = [rest for name, rest in instructions(service) if name in ("FROM", "ARG")]
    assert before[0] == "PYTHON_IMAGE=python:3.11-slim-bookworm"
    named = {re.search(r" AS (\w+)$", stage[0][1]) for stage in stages(service)}
    own = {match[1] for match in named if match}
    for stage in stages(service):
        base = stage[0][1].split(" ")[0]
        assert base == "${PYTHON_IMAGE}" or base in own
    assert stages(service)[-1][0][1] == "${PYTHON_IMAGE}"


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_runs_as_nobody_and_starts_without_a_shell(service: str) -> None:
    assert last(service, "USER") == [USER]
    assert last(service, "ENTRYPOINT") == [f'["python", "-m", "services.{service}"]']
    assert not last(service, "CMD")


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_says_how_it_is_and_what_it_is(service: str) -> None:
    (check,) = last(service, "HEALTHCHECK")
    assert check.endswith(f'CMD ["python", "-m", "hiprune.health", "{service}"]')
    assert "--start-period=" in check
    (labels,) = last(service, "LABEL")
    told = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', labels))
    assert {"title", "description", "licenses", "version", "revision", "created", "base.name"} <= set(told)
    assert told["title"] == f"hiprune {service}"
    assert f"{PORTS[service]} 9464" in last(service, "EXPOSE")


@pytest.mark.parametrize("service", SERVICES)
def test_the_version_is_the_projects(service: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"VERSION={version}" in last(service, "ARG")
    assert pins()["HIPRUNE_VERSION"] == version


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_is_installed_or_fetched_in_the_stage_that_becomes_the_image(service: str) -> None:
    for name, rest in instructions(service):
        assert name != "ADD"
        assert not re.search(r"\b(curl|wget)\b|\|\s*(ba|da)?sh\b", rest)
    for rest in last(service, "RUN"):
        assert not re.search(r"\b(pip|apt|apt-get|apk|gcc|venv)\b", rest)


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_takes_the_service_the_library_and_the_model_or_its_samples_and_nothing_else(
    service: str,
) -> None:
    copied = [
        rest
        for stage in stages(service)
        for name, rest in stage
        if name == "COPY" and not rest.startswith("--from=")
    ]
    expected = {
        "pyproject.toml constraints.txt /build/",
        "tools/fill_image.py /build/tools/",
        "LICENSE ./",
        "src/hiprune src/hiprune",
        "services/__init__.py services/",
        f"services/{service} services/{service}",
    }
    if service in WITH_MODEL:
        expected.add("models/shapes/checkpoint models/shapes/checkpoint")
    if service == "gateway":
        expected.add("models/shapes/samples models/shapes/samples")  # the pictures that its playground offers
    assert set(copied) == expected
    taken = {rest for rest in last(service, "COPY") if rest.startswith("--from=")}
    assert taken <= {
        "--from=common /opt/venv /opt/venv",
        "--from=own /opt/venv /opt/venv",
        "--from=own /opt/service /opt/service",
        "--from=own /opt/bytecode /opt/bytecode",
        "--from=own /opt/triton /opt/triton",
        "--from=own /app /app",
    }
    assert len(taken) == len(last(service, "COPY"))


def test_images_with_a_model_share_their_layers_up_to_what_is_theirs_alone() -> None:
    """Same words, same arguments: so the same layer, built, kept and sent once."""
    first = [stages(service)[0] for service in WITH_MODEL]
    assert first[0] == first[1] == first[2]
    ends = [stages(service)[-1][:4] for service in WITH_MODEL]
    assert ends[0] == ends[1] == ends[2]
    assert ends[0][-1] == ("COPY", "--from=common /opt/venv /opt/venv")


def test_what_the_build_may_see_is_named() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    for service in SERVICES:
        for name, rest in instructions(service):
            if name == "COPY" and not rest.startswith("--from="):
                for source in rest.split()[:-1]:
                    assert any(source == each or source.startswith(f"{each}/") for each in let_in), source
    assert all((ROOT / each).exists() for each in let_in)


# --- what fills them -------------------------------------------------------------------------------------


def test_the_shared_layer_holds_what_all_three_need_and_no_more() -> None:
    shared = fill_image.shared_requirements()
    assert all(set(shared) <= set(fill_image.requirements(service)) for service in WITH_MODEL)
    names = {re.split(r"[<>=\[;]", each)[0] for each in shared}
    assert {"torch", "transformers", "grpcio", "redis", "pydantic"} <= names
    assert not {"pillow", "cryptography", "vllm", "triton"} & names


def test_what_decodes_pictures_is_the_encoders_alone() -> None:
    for service in WITH_MODEL:
        has_it = any(each.startswith("pillow") for each in fill_image.requirements(service))
        assert has_it == (service == "encoder")


def test_the_pruner_takes_no_gpus_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    monkeypatch.setattr(fill_image, "site_packages", lambda: tmp_path)
    version = tmp_path / "torch" / "version.py"
    version.write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", "utf-8")
    fill_image.check_build("cpu")
    with pytest.raises(SystemExit, match="TORCH_INDEX"):
        fill_image.check_build("cuda")
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '12.9'\n", "utf-8")
    fill_image.check_build("cuda")
    with pytest.raises(SystemExit, match=r"CUDA 12\.9"):
        fill_image.check_build("cpu")
    assert "pruner" in fill_image.NEVER_ON_A_GPU


def test_sealed_code_is_taken_whatever_moment_its_source_is_of(tmp_path: Path) -> None:
    source, compiled = tmp_path / "thing.py", tmp_path / "compiled"
    source.write_text("found = __spec__.cached\n", "utf-8")

    def loaded() -> str:
        command = [sys.executable, "-v", "-c", "import thing"]
        environ = {"PYTHONPATH": str(tmp_path), "PYTHONPYCACHEPREFIX": str(compiled)}
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stderr

    loaded()
    fill_image.seal(compiled)
    os.utime(source, (1, 1))
    taken = f"code object from '{compiled}"
    (line,) = (each for each in loaded().splitlines() if "code object" in each and "thing" in each)
    assert line.startswith(f"# {taken}")


def test_torch_is_pinned() -> None:
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", fill_image.pinned("torch"))


# --- Compose ---------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    """The lines of .env."""
    lines = (ROOT / ".env").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose(file: str = "docker-compose.yml") -> dict[str, Any]:
    """A Compose file as YAML has it, its variables not filled in."""
    content: dict[str, Any] = yaml.safe_load((ROOT / file).read_text("utf-8"))
    return content


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from compose()["services"].items()


OURS = [name for name, _ in containers() if name in SERVICES]


def test_compose_runs_every_service_and_redis() -> None:
    assert {*SERVICES, "redis"} <= set(compose()["services"])
    watched = {name for name, each in containers() if each.get("profiles") == ["observability"]}
    assert watched == {"collector", "prometheus", "jaeger", "grafana"}


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_every_variable_of_compose_is_a_setting_that_exists(file: str) -> None:
    for name, each in compose(file)["services"].items():
        if name not in SERVICES:
            continue
        settings = importlib.import_module(f"services.{name}.settings").Settings
        known = {f"{settings.env_prefix}{field.upper()}" for field in settings.model_fields}
        ours = {key for key in each["environment"] if key.startswith("HIPRUNE_")}
        assert ours
        assert ours <= known, name


@pytest.mark.parametrize("name", OURS)
def test_what_compose_sets_is_taken_by_the_service(name: str) -> None:
    environ = {key: filled(value) for key, value in compose()["services"][name]["environment"].items()}
    settings = importlib.import_module(f"services.{name}.settings").Settings.read([], environ)
    assert settings.metrics_listen.endswith(":9464")


def test_ports_are_published_on_this_machine_alone() -> None:
    published = [port for _, each in containers() for port in each.get("ports", ())]
    assert published
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port) for port in published)
    assert not any("network_mode" in each for _, each in containers())


def test_who_publishes_no_port_is_on_networks_that_nobody_else_reaches() -> None:
    networks = compose()["networks"]
    for name, each in containers():
        if not each.get("ports") and name != "collector":
            assert all(networks[network]["internal"] for network in each["networks"]), name


def test_containers_may_do_and_write_nothing() -> None:
    for name, each in containers():
        assert each["read_only"] is True, name
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert each["restart"] == "unless-stopped", name
        assert each["mem_limit"], name
        assert "privileged" not in each
        mounts = [volume for volume in each.get("volumes", ()) if not volume.startswith("run:")]
        assert all(volume.endswith(":ro") for volume in mounts), name


def test_images_are_pinned() -> None:
    for name, each in containers():
        if name in SERVICES:
            assert each["image"] == f"hiprune/{name}:${{HIPRUNE_VERSION}}"
            assert each["build"]["dockerfile"] == f"services/{name}/Dockerfile"
        else:
            image = pins()[each["image"].strip("${}")]
            tag = image.rpartition(":")[2]
            assert re.search(r"\d", tag), image
            assert tag != "latest"


def test_starting_waits_for_health_and_the_encoder_stops_last() -> None:
    waits = {
        name: {other: how["condition"] for other, how in each.get("depends_on", {}).items()}
        for name, each in containers()
    }
    assert waits["llm"] == {"encoder": "service_healthy", "pruner": "service_healthy"}
    assert waits["pruner"] == {"redis": "service_healthy", "encoder": "service_started"}
    assert waits["encoder"] == {}
    assert compose()["services"]["redis"]["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]


@pytest.mark.parametrize("name", OURS)
def test_a_service_has_the_time_to_drain(name: str) -> None:
    settings = importlib.import_module(f"services.{name}.settings").Settings
    drain_ms = settings.model_fields["drain_ms"].default
    grace_s = int(compose()["services"][name]["stop_grace_period"].removesuffix("s"))
    assert grace_s * 1000 > drain_ms + 5_000


def test_encoder_and_pruner_have_one_folder_in_memory_for_the_socket_and_for_large_answers() -> None:
    services, options = compose()["services"], compose()["volumes"]["run"]["driver_opts"]
    assert options["type"] == "tmpfs"
    uid = USER.partition(":")[0]
    assert {f"uid={uid}", "mode=0700"} <= set(options["o"].split(","))
    for name in ("encoder", "pruner"):
        assert "run:/run/hiprune" in services[name]["volumes"]
        folder = services[name]["environment"][f"HIPRUNE_{name.upper()}_SHARED_MEMORY_DIR"]
        assert folder == "/run/hiprune"
    socket = services["encoder"]["environment"]["HIPRUNE_ENCODER_LISTEN"]
    assert socket == "unix:/run/hiprune/encoder.sock"
    assert socket == services["pruner"]["environment"]["HIPRUNE_PRUNER_ENCODER"]
    others = (each for name, each in containers() if name not in ("encoder", "pruner"))
    assert all("run:/run/hiprune" not in each.get("volumes", ()) for each in others)


def test_redis_is_a_cache_of_bounded_size() -> None:
    command = compose()["services"]["redis"]["command"]
    assert "--maxmemory-policy allkeys-lru" in command
    assert '--save ""' in command
    assert "--appendonly no" in command


def test_what_the_profile_mounts_is_there() -> None:
    for _, each in containers():
        for volume in each.get("volumes", ()):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists(), volume


def filled(value: str) -> str:
    """A value as Compose would fill it in, with nothing set but what .env sets."""
    return re.sub(
        r"\$\{(\w+)(?::-([^}]*))?\}", lambda match: pins().get(match[1], match[2] or ""), str(value)
    )
