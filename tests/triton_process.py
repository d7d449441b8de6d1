"""Triton where there is no GPU: its interpreter, and its compiler for GPUs that are elsewhere.

Both in child processes, since what Triton does is settled when it is first imported: an interpreter in this
process would leak into every later test. `interpreter()` gives a pool to submit `kernels.column_sums` to;
`compiled` is submitted to `compiler()`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from services.encoder import kernels


def interpreter() -> ProcessPoolExecutor:
    """One process in which kernels run as NumPy, slowly, on CPU tensors."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret)


def compiler(cache: Path) -> ProcessPoolExecutor:
    """One process in which kernels compile and are never launched; `cache` is an empty folder."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_compile_only, initargs=(cache,))


def far_apart(distance: int, query: Tensor, key: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    """`column_sums` of keys whose heads lie `distance` elements apart; too wide to be sent here as it is."""
    tokens, heads, head_dim = key.shape
    storage = torch.empty(heads * distance, dtype=key.dtype)  # pages that nobody touches take no memory
    spread = storage.as_strided((tokens, heads, head_dim), (head_dim, distance, 1))
    spread.copy_(key)
    return kernels.column_sums(query, spread, cu_seqlens, **options)


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel."""

    ptx: str
    registers: int  # a thread
    spilled_bytes: int  # a thread
    shared_bytes: int  # a program


def compiled(capability: int, dtype: torch.dtype, head_dim: int) -> dict[str, Compiled]:
    """The kernels, by name, that `column_sums` would launch on a GPU of this capability (80, 90, …)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, KernelInterface

    target = GPUTarget("cuda", capability, 32)
    driver.set_active(  # type: ignore[attr-defined]
        SimpleNamespace(
            get_current_device=lambda: capability,  # variants are kept by device
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    found: dict[str, Compiled] = {}

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            found[kernel.fn.__name__] = _inspect(kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return launch

    KernelInterface.__getitem__ = compile_only
    packed = torch.zeros(100, 2, head_dim, dtype=dtype)
    cu_seqlens = torch.tensor([0, 1, 100], dtype=torch.int32)
    kernels.column_sums(packed, packed, cu_seqlens, scaling=0.125, max_seqlen=99)
    return found


def _inspect(kernel: Any) -> Compiled:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    return Compiled(kernel.asm["ptx"], int(numbers[1]), int(numbers[2]), kernel.metadata.shared)


def _compile_only(cache: Path) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    torch.set_num_threads(1)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # NumPy's for inf - inf and the like. Overflow is no error: rows past a segment's end hold nothing real.
    warnings.filterwarnings("error", "invalid value", RuntimeWarning)

    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    # The interpreter keeps bf16 as its bits and multiplies those, as of 3.7 (triton-lang/triton#11584).
    # Here they become float32 first, which holds every product of two of them.
    multiply = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot
