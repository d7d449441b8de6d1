"""Renders every overlay of `deploy/k8s` into `deploy/k8s/rendered`, with `kubectl kustomize`.

`python tools/render_k8s.py`. Each rendered file begins with a digest of what it was made of, so that a test
can tell that it is stale where there is no kubectl; where there is one, the test renders again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
K8S: Final = ROOT / "deploy" / "k8s"
LEAST: Final = (1, 27)
"""The kubectl whose kustomize knows everything that is used here."""


@cache
def kubectl() -> str | None:
    """A kubectl that is new enough, on PATH; None without one."""
    program = shutil.which("kubectl")
    if program is None:
        return None
    said = subprocess.run(
        [program, "version", "--client", "--output=json"], capture_output=True, text=True, check=False
    )
    try:
        version = json.loads(said.stdout)["clientVersion"]
        numbers = int(version["major"]), int(re.sub(r"\D.*", "", version["minor"]))
    except (ValueError, KeyError):
        return None
    return program if numbers >= LEAST else None


def overlays(k8s: Path = K8S) -> list[str]:
    """Names of the overlays."""
    return sorted(path.parent.name for path in k8s.glob("overlays/*/kustomization.yaml"))


def sources(k8s: Path = K8S) -> str:
    """A digest of every file that the overlays may be made of."""
    digest = hashlib.sha256()
    for folder in ("base", "components", "overlays"):
        for path in sorted((k8s / folder).rglob("*")):
            if path.suffix in {".yaml", ".conf"} and path.name != "tenants.yaml":
                name, content = path.relative_to(k8s).as_posix().encode(), path.read_bytes()
                digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()


def rendered(folder: Path, program: str) -> str:
    """What a kustomization makes, as YAML. Raises CalledProcessError."""
    return subprocess.run(
        [program, "kustomize", str(folder)], capture_output=True, text=True, check=True
    ).stdout


def head(k8s: Path = K8S) -> str:
    """The first line of a rendered file."""
    return f"# made by tools/render_k8s.py from sources {sources(k8s)}\n"


def main() -> None:
    """Rewrites every rendered file."""
    program = kubectl()
    if program is None:
        sys.exit(f"render_k8s: needs kubectl {'.'.join(map(str, LEAST))} or newer on PATH")
    for name in overlays():
        try:
            text = rendered(K8S / "overlays" / name, program)
        except subprocess.CalledProcessError as error:
            sys.exit(f"render_k8s: {name}: {error.stderr}")
        (K8S / "rendered" / f"{name}.yaml").write_text(head() + text, "utf-8")


if __name__ == "__main__":
    main()
