"""What Triton would compile in C on a machine with a GPU, made beforehand: an image needs no compiler then.

Triton brings the compilers of its kernels, ptxas too. A C compiler it needs for one thing: the module through
which Python calls the driver, whose source is the same for every kernel (Triton 3.7's `driver.c`; up to 3.6
it made another one for each kernel's signature). It looks for that module in its cache, under a digest of the
source, before it compiles.

`python -m services.encoder.triton_cache FOLDER`, where there is a compiler and no GPU, puts it into FOLDER;
`TRITON_CACHE_MANAGER=services.encoder.triton_cache:ReadyMade` has Triton look there behind its own cache. A
Triton with another source finds nothing, says that it needs a compiler, and the encoder does without its
kernels: see `services.encoder.kernels.probe`. So it is where the program `file` is there and was not at the
build, or the other way round: the digest has in it what that says of Python. Imported by Triton alone, and
where images are built.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from triton.runtime.cache import FileCacheManager

FOLDER: Final = Path("/opt/triton")
MODULE: Final = "cuda_utils"
DRIVER: Final = "libcuda.so.1"


class ReadyMade(FileCacheManager):  # type: ignore[misc]  # untyped upstream
    """Triton's own cache of files, and behind it the folder of what came with the image."""

    def get_file(self, filename: str) -> str | None:
        """The path of a file of this key's; None where there is none."""
        own: str | None = super().get_file(filename)
        ready = FOLDER / self.key / filename
        return own or (str(ready) if ready.is_file() else None)


def make(folder: Path) -> list[Path]:
    """Compiles the module into a folder as Triton's cache would hold it, and returns its files.

    Raises what the compiler does.
    """
    from triton import knobs
    from triton.backends.nvidia import driver

    with tempfile.TemporaryDirectory() as scratch:
        # The linker wants a library of that name, and notes it only if it has what is called. The real one is
        # the driver's, and is there at run time.
        source = Path(driver.dirname, "driver.c").read_text("utf-8")
        called = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", source)))
        stand_in = Path(scratch) / "libcuda.c"
        stand_in.write_text("".join(f"void {name}(void) {{}}\n" for name in called), "utf-8")
        library = str(Path(scratch) / DRIVER)
        command = [os.environ.get("CC", "gcc"), "-shared", "-o", library, f"-Wl,-soname,{DRIVER}"]
        # what Triton itself would run
        subprocess.run([*command, str(stand_in)], check=True)  # noqa: S603
        knobs.cache.dir, knobs.nvidia.libcuda_path = str(folder), scratch
        with suppress(ImportError):  # it has been stored by then; without a driver it cannot be loaded
            driver.CudaUtils()
    return sorted(folder.rglob(f"{MODULE}*.so"))


if __name__ == "__main__":
    if not make(Path(sys.argv[1])):
        raise SystemExit(f"triton made no {MODULE}: how it calls the driver has changed")
