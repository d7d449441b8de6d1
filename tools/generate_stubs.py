"""Generates the gRPC stubs from `protos/`: `python tools/generate_stubs.py [OUT]`, by default into `src`."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path) -> None:
    """Writes `hiprune/v1/*_pb2{,_grpc}.py{,i}` under `out`. Raises SystemExit when protoc fails."""
    out.mkdir(parents=True, exist_ok=True)
    scripts = Path(sys.executable).parent  # where pip puts programs, on PATH or not
    protos = sorted(str(path) for path in (ROOT / "protos").rglob("*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={ROOT / 'protos'}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        *(f"--plugin={plugin}={scripts / plugin}" for plugin in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *protos,
    ]
    if code := protoc.main(arguments):
        raise SystemExit(code)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "src")
