"""What the Dockerfiles run to fill an image, in a stage of the build, by the Python that the image has.

    python tools/fill_image.py common cpu|cuda    what all services with a model need, into /opt/venv
    python tools/fill_image.py own SERVICE        what one needs beside that, into /opt/service
    python tools/fill_image.py try SERVICE        starts it once, with the included model, and stops it

What several images need is the same files in the same layer of each, kept and sent once. torch comes first,
alone and pinned, for the reasons in docs/decisions/0007-torch-first.md; TORCH_INDEX names the package index
for that step where the usual one has another build of it. `try` shows that an image lacks nothing, and leaves
in /opt/bytecode what was imported, compiled. Needs the standard library alone; knows no Docker.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = Path("/opt/venv")
OWN: Final = Path("/opt/service")
"""On the environment's path by `service.pth`, also where there is no such folder, which is no error."""
BYTECODE: Final = Path("/opt/bytecode")
"""PYTHONPYCACHEPREFIX of the image. Libraries come uncompiled: a service imports a quarter of them."""
WITH_MODEL: Final = ("encoder", "pruner", "llm")
NEVER_ON_A_GPU: Final = ("pruner",)
PATIENCE_S: Final = 300.0

# What nothing imports at run time: what torch's extensions are compiled with, the libraries' own tests.
# torch_shm_manager stays: torch's shared memory between processes starts it.
LEFT_OUT: Final = (
    "torch/include",
    "torch/share",
    "torch/test",
    "torch/bin/[!t]*",
    "torch/bin/test_*",
    "torch/lib/*.a",
    "torch/lib/lib*test*",
    "torch/lib/libbackend_with_compiler.so",
    "numpy/**/tests",
    "sympy/**/tests",
    "networkx/**/tests",
    "mpmath/**/tests",
    "**/*.pyi",
)


def main() -> None:
    """Raises SystemExit with a sentence when something cannot be done."""
    match sys.argv[1:]:
        case ["common", ("cpu" | "cuda") as accelerator]:
            fill_common(accelerator)
        case ["own", service]:
            fill_own(service)
        case ["try", service]:
            try_once(service)
        case _:
            raise SystemExit(__doc__)


def fill_common(accelerator: str) -> None:
    """Makes the environment, with torch and what the services that have a model share."""
    make_environment()
    # without what it needs, so that a build for the wrong device is found out before its libraries come
    pip("--no-deps", pinned("torch"), index=os.environ.get("TORCH_INDEX", ""))
    check_build(accelerator)
    pip(*shared_requirements())
    leave_out()


def fill_own(service: str) -> None:
    """Installs what a service needs beside what is there, and moves it to a folder of its own."""
    if not VENV.exists():
        make_environment()
    elif service in NEVER_ON_A_GPU:
        check_build("cpu")
    site = site_packages()
    before = set(files_in(site))
    pip(*requirements(service))
    leave_out()
    OWN.mkdir(exist_ok=True)
    for path in sorted(set(files_in(site)) - before):
        target = OWN / path.relative_to(site)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def try_once(service: str) -> None:
    """Starts the service as the image will, waits until it is ready, and stops it."""
    address = f"unix:/tmp/{service}.sock"  # in a stage that nobody else is in
    prefix = f"HIPRUNE_{service.upper()}_"
    environ = {**os.environ, f"{prefix}LISTEN": address, "HF_HUB_OFFLINE": "1"}
    environ |= {"PYTHONPYCACHEPREFIX": str(BYTECODE), "PYTHONDONTWRITEBYTECODE": ""}
    python = str(VENV / "bin" / "python")
    # what is nothing without another service is only to live
    question = [] if service in WITH_MODEL else ["liveness"]
    process = subprocess.Popen([python, "-m", f"services.{service}"], env=environ)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while subprocess.run(
            [python, "-m", "hiprune.health", service, *question],
            env=environ,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{service} did not become ready; its reason stands above")
    finally:
        process.send_signal(signal.SIGTERM)
    if code := process.wait(PATIENCE_S):
        raise SystemExit(f"{service} left with code {code}")
    seal(BYTECODE)


# --- what is needed --------------------------------------------------------------------------------------


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return content


def requirements(service: str) -> list[str]:
    """What a service needs: the project's own, and its extra's."""
    told = project()
    return [*told["dependencies"], *told["optional-dependencies"][service]]


def shared_requirements() -> list[str]:
    """What every service with a model needs, in the order of the first's extra."""
    first, *others = (requirements(service) for service in WITH_MODEL)
    return [each for each in first if all(each in other for other in others)]


def pinned(name: str) -> str:
    """The line of constraints.txt for a package. Raises SystemExit when there is none."""
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise SystemExit(f"constraints.txt has no {name}==")


def check_build(accelerator: str) -> None:
    """Refuses torch's build for another device. Raises SystemExit."""
    told = (site_packages() / "torch" / "version.py").read_text("utf-8")
    cuda = re.search(r"^cuda\b.*= '(.+)'", told, re.MULTILINE)
    if bool(cuda) != (accelerator == "cuda"):
        found = f"for CUDA {cuda.group(1)}" if cuda else "for the CPU"
        raise SystemExit(
            f"this is torch's build {found}, and the image is to be for {accelerator}: name the package "
            "index that has the right one, --build-arg TORCH_INDEX=URL"
        )


# --- steps -----------------------------------------------------------------------------------------------


def make_environment() -> None:
    """An environment without pip, which looks into the service's own folder too."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(VENV)], check=True)
    (site_packages() / "service.pth").write_text(f"{OWN}\n", "utf-8")


def site_packages() -> Path:
    """Where the environment's packages lie."""
    version = sys.version_info
    return VENV / "lib" / f"python{version.major}.{version.minor}" / "site-packages"


def pip(*what: str, index: str = "") -> None:
    """pip install into the environment, under the constraints, nothing kept. Raises SystemExit."""
    environ = {**os.environ, **({"PIP_INDEX_URL": index} if index else {})}
    command = [sys.executable, "-m", "pip", "--python", str(VENV / "bin" / "python"), "install"]
    options = ["--no-cache-dir", "--no-compile", "--disable-pip-version-check", "--root-user-action=ignore"]
    bounds = ["--constraint", str(ROOT / "constraints.txt")]
    if subprocess.run([*command, *options, *bounds, "-q", *what], env=environ, check=False).returncode:
        raise SystemExit("pip failed; its reason stands above")


def leave_out() -> None:
    """Removes what no service runs, and the programs that packages bring, but for Python."""
    site = site_packages()
    for pattern in LEFT_OUT:
        for path in sorted(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for path in (VENV / "bin").iterdir():
        if not path.name.startswith("python"):
            path.unlink()


def seal(folder: Path) -> None:
    """Ties compiled code to its source by digest and no longer by the moment of the source's last change.

    Python then takes it as it is (PEP 552, unchecked). Docker's cache goes by content: a layer taken from it
    brings the same sources with another moment, and all would be compiled again at each start.
    """
    for path in folder.rglob("*.pyc"):
        compiled = path.read_bytes()
        source = Path("/", path.relative_to(folder).parent, f"{path.name.partition('.')[0]}.py")
        digest = importlib.util.source_hash(source.read_bytes())
        path.write_bytes(compiled[:4] + (1).to_bytes(4, "little") + digest + compiled[16:])


def files_in(folder: Path) -> Iterable[Path]:
    """Every file below a folder."""
    return (path for path in folder.rglob("*") if not path.is_dir())


if __name__ == "__main__":
    main()
