"""What an image has instead of a compiler: Triton finds a module that was compiled beforehand, and no other.

Held against Triton's own way from a source to a module, with a module of another package's in the place of
the one that calls the driver. That Triton makes the latter is for the image's build to show.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import _cffi_backend
import pytest
from triton.runtime import build
from triton.runtime.cache import FileCacheManager

from services.encoder import kernels, triton_cache

SOURCE = "/* as it would be compiled */"
NAME = "_cffi_backend"


@pytest.fixture
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no compiler, an empty cache of Triton's and a folder for what is ready: that folder."""
    for name in ("CC", "TRITON_CACHE_MANAGER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    ready = tmp_path / "ready"
    monkeypatch.setattr(triton_cache, "FOLDER", ready)
    return ready


def make_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the image's build does: Triton stores in the folder what a compiler has made."""
    with monkeypatch.context() as building:
        building.setenv("TRITON_CACHE_DIR", str(folder))
        building.setattr(build, "_build", lambda *given: _cffi_backend.__file__)
        build.compile_module_from_src(SOURCE, NAME)


def test_what_was_compiled_beforehand_is_found_without_a_compiler(
    without_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ready(without_compiler, monkeypatch)
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        build.compile_module_from_src(SOURCE, NAME)
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "services.encoder.triton_cache:ReadyMade")
    loaded = build.compile_module_from_src(SOURCE, NAME)
    assert Path(str(loaded.__file__)).is_relative_to(without_compiler)


def test_another_source_finds_nothing_and_needs_a_compiler(
    without_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ready(without_compiler, monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "services.encoder.triton_cache:ReadyMade")
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        build.compile_module_from_src(SOURCE + " ", NAME)


def test_tritons_own_cache_comes_first(without_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ready(without_compiler, monkeypatch)
    (key,) = (path.name for path in without_compiler.iterdir())
    own = FileCacheManager(key)
    stored = own.put(b"newer", "kernel.cubin")
    (without_compiler / key / "kernel.cubin").write_bytes(b"older")
    assert triton_cache.ReadyMade(key).get_file("kernel.cubin") == stored


def test_with_such_a_cache_the_kernels_are_tried(
    without_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels._absence.cache_clear()
    assert not kernels.available()
    kernels._absence.cache_clear()
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "services.encoder.triton_cache:ReadyMade")
    assert kernels.available()
    kernels._absence.cache_clear()
    assert shutil.which("gcc") is None
