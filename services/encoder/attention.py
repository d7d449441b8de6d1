"""How much attention each token of a vision tower receives, without ever holding an attention matrix.

    score[l] = mean over heads of the sum over queries of A      # A (heads, queries, keys): probabilities

(HiPrune, arXiv 2508.00553v3.) A tower on SDPA never forms A, and eager attention forms it in every layer,
O(N²) memory each. So the layers of interest, and only those, run an attention function that takes its
output from SDPA unchanged and, while somebody records, recomputes A piece by piece and keeps the sums: in
chunks that stay in cache on a CPU, by the kernels of `kernels` on a GPU.

Knows transformers' attention interface and nothing of families, images or layers' meaning: whether a row
belongs to a CLS token, a window or a patch is for the caller to tell.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hiprune.errors import InvalidInput, Unsupported
from hiprune.telemetry import note
from services.encoder import kernels, segments

log = logging.getLogger("hiprune.encoder")

DENSE: Final = "hiprune_capture"
PACKED: Final = "hiprune_flash_capture"
"""Names of our attention functions among transformers' own ("sdpa", "eager", …). A tower that packs its
images into one sequence hands the boundaries on to functions with "flash" in their name, and splits for
others."""

_CPU_CHUNK_BYTES: Final = 4 * 2**20  # stays in cache: four times as fast as the whole matrix at N = 4096
_LONG: Final = 4096  # keys; beyond, rows are cut too
_GPU_CHUNK_BYTES: Final = 32 * 2**20  # about a data-centre GPU's L2; holds a CLIP-L/336 image whole


@torch.no_grad()
def column_sums(query: Tensor, key: Tensor, *, scaling: float) -> Tensor:
    """Attention that each key receives: softmax, summed over queries, averaged over heads.

    query, key  # (B, heads, N, d), any float dtype, any strides
    returns     # (B, N) float32; each image's N scores add up to N

    Equals `eager_column_sums` within 1e-5 relative, in O(heads · N) memory.
    """
    batch, heads, tokens, width = key.shape
    if not _has_kernel(key):
        return chunked_column_sums(query, key, scaling=scaling)
    boundaries = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=key.device)
    queries, keys = (tensor.transpose(1, 2).reshape(-1, heads, width) for tensor in (query, key))
    sums = kernels.column_sums(queries, keys, boundaries, scaling=scaling, max_seqlen=tokens)  # (B · N,)
    return sums.view(batch, tokens)


@torch.no_grad()
def packed_column_sums(
    query: Tensor,
    key: Tensor,
    boundaries: Tensor,
    *,
    scaling: float,
    longest: int,
    log_sums: Tensor | None = None,
) -> Tensor:
    """`column_sums` of S segments one behind the other, each attending within itself.

    query, key  # (n, heads, d)
    boundaries  # (S + 1,) int32, ascending from 0
    longest     # rows of the longest segment
    log_sums    # (heads, n) float32: log-sum-exp of each row's scaled logits, where the forward had it
    returns     # (n,) float32; each segment's scores add up to its length
    """
    if _has_kernel(key):
        return kernels.column_sums(query, key, boundaries, scaling=scaling, max_seqlen=longest, lse=log_sums)
    parts = []
    for run in segments.runs(boundaries):
        queries, keys = (segments.split(tensor, *run) for tensor in (query, key))  # (count, heads, length, d)
        known = None
        if log_sums is not None:
            known = segments.split(log_sums.mT[..., None], *run)[..., 0]  # (count, heads, length)
        parts.append(chunked_column_sums(queries, keys, scaling=scaling, log_sums=known).flatten())
    return torch.cat(parts)


@torch.no_grad()
def chunked_column_sums(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    log_sums: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """`column_sums` piece by piece, by matrix products: the way on a CPU, and wherever no kernel runs.

    query, key  # (B, heads, N, d), any float dtype, any strides
    log_sums    # (B, heads, N) float32: as for `packed_column_sums`; spares long sequences half the work
    returns     # (B, N) float32; each image's N scores add up to N

    Logits, softmax and sums are float32 whatever the inputs are, since sums rounded to bf16 tie. Holds
    `chunk_bytes` of probabilities at a time, or one row of N; the default suits the device.
    """
    batch, heads, tokens, _ = key.shape
    if chunk_bytes is None:
        chunk_bytes = _CPU_CHUNK_BYTES if key.device.type == "cpu" else _GPU_CHUNK_BYTES
    budget = chunk_bytes // torch.float32.itemsize
    flat = (query.flatten(0, 1), key.flatten(0, 1))  # (B · heads, N, d) each
    if tokens > _LONG:
        sums = _sums_by_tiles(*flat, scaling, None if log_sums is None else log_sums.flatten(0, 1), budget)
    else:
        sums = _sums_by_rows(*flat, scaling, budget)
    return sums.view(batch, heads, tokens).mean(dim=1)


def _sums_by_rows(query: Tensor, key: Tensor, scaling: float, budget: int) -> Tensor:
    """Column sums (G, N) of G heads, whole rows of probabilities at a time. query, key: (G, N, d)."""
    heads, tokens, _ = key.shape
    # As many rows of one head as fit, then as many heads: the products stay tall. A few rows of every head
    # take twice as long at N = 4096.
    rows = min(query.shape[1], max(1, budget // tokens))
    group = min(heads, max(1, budget // (rows * tokens)))
    buffer = torch.empty(group * rows * tokens, dtype=torch.float32, device=key.device)
    sums = torch.zeros(heads, tokens, dtype=torch.float32, device=key.device)
    parts = (torch.split(part, group) for part in (query, key, sums))
    for queries, keys, received in zip(*parts, strict=True):  # (≤group, N, d) twice, (≤group, N)
        transposed = keys.float().mT  # (≤group, d, N)
        for some in torch.split(queries, rows, dim=1):  # (≤group, ≤rows, d)
            shape = (*some.shape[:2], tokens)
            attention = buffer[: shape[0] * shape[1] * tokens].view(shape)
            # `alpha` scales after the product, so bf16 inputs stay exact also where TF32 is allowed.
            torch.baddbmm(attention, some.float(), transposed, beta=0, alpha=scaling, out=attention)
            torch.softmax(attention, dim=-1, out=attention)
            received.add_(attention.sum(dim=1))  # a view of `sums`
    return sums


def _sums_by_tiles(
    query: Tensor, key: Tensor, scaling: float, log_sums: Tensor | None, budget: int
) -> Tensor:
    """Column sums (G, N) of G heads, tile by tile. query, key: (G, N, d); log_sums: (G, N) or None.

    A row of 65,536 probabilities is 256 KB: of whole rows so few fit into a cache that each product streams
    all keys from memory for a handful of queries.
    """
    heads, tokens, _ = key.shape
    columns = min(tokens, _LONG)
    rows = max(1, budget // columns)
    buffer = torch.empty(rows * columns, dtype=torch.float32, device=key.device)
    sums = torch.zeros(heads, tokens, dtype=torch.float32, device=key.device)

    def logits(some: Tensor, keys: Tensor) -> Tensor:
        tile = buffer[: len(some) * keys.shape[1]].view(len(some), -1)  # (≤rows, ≤columns)
        return torch.addmm(tile, some, keys, beta=0, alpha=scaling, out=tile)

    for head in range(heads):
        tiles = torch.split(key[head].float().mT, columns, dim=1)  # (d, ≤columns) each
        received = torch.split(sums[head], columns)
        for start in range(0, query.shape[1], rows):
            some = query[head, start : start + rows].float()  # (≤rows, d)
            if log_sums is not None:
                total = log_sums[head, start : start + rows]  # (≤rows,)
            else:
                total = torch.stack([logits(some, keys).logsumexp(dim=1) for keys in tiles]).logsumexp(dim=0)
            for keys, sink in zip(tiles, received, strict=True):
                sink.add_(logits(some, keys).sub_(total[:, None]).exp_().sum(dim=0))
    return sums


def _has_kernel(key: Tensor) -> bool:
    width, dtype, device = key.shape[-1], key.dtype, key.device
    return kernels.supports(width, dtype, device) and _kernel_runs(width, dtype, device)


@cache
def _kernel_runs(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Tries it, once each, and says in the log where scores come from if it does not run."""
    reason = kernels.probe(device, head_dim=head_dim, dtype=dtype)
    if reason is not None:
        log.warning("scores on %s by matrix products, slower than by kernels: %s", device, reason)
    return reason is None


@torch.no_grad()
def first_row(query: Tensor, key: Tensor, *, scaling: float) -> Tensor:
    """What row 0, a tower's CLS, attends to: its softmax over all keys, averaged over heads.

    query, key  # (B, heads, N, d), any float dtype, any strides
    returns     # (B, N) float32; adds up to 1 for each image

    One query against N keys: by a product of its own, apart from the sums over all queries.
    """
    # scaled after the product, as in `column_sums`
    logits = (query[:, :, :1].float() @ key.float().mT).squeeze(2) * scaling  # (B, heads, N)
    return logits.softmax(dim=-1).mean(dim=1)


def eager_column_sums(query: Tensor, key: Tensor, *, scaling: float) -> Tensor:
    """`column_sums` as its definition reads, holding all (B, heads, N, N) probabilities. For tests.

    query, key  # (B, heads, N, d)
    returns     # (B, N) float32
    """
    attention = (query.float() @ key.float().mT * scaling).softmax(dim=-1)
    return attention.sum(dim=2).mean(dim=1)


@dataclass(frozen=True)
class _Recording:
    layer_of: Mapping[nn.Module, int]
    scores: dict[int, Tensor]  # layer -> (B, N)
    first_rows: dict[int, Tensor] | None  # layer -> (B, N); None: nobody asks


# A context variable and not an argument, as SigLIP's attention passes no keyword arguments on; and one per
# thread, so that concurrent forwards of one tower do not mix.
_recording: ContextVar[_Recording | None] = ContextVar("hiprune_recording", default=None)


class ScoreCapture:
    """Records the scores of a tower's layers while it runs, on request.

    `attention_modules` maps 1-based layers to the modules that call the attention interface (CLIP and
    SigLIP: `encoder.layers[i].self_attn`; Qwen2.5-VL: `blocks[i].attn`, `packed`). Those modules are changed
    for good: they run SDPA through our function, which changes no bit of any output where they are not
    packed; the tower's other modules are left as they are.

        with capture.recording({9, 23}) as scores:
            hidden = tower(pixels)
        scores[9]  # (B, N) float32
    """

    def __init__(self, attention_modules: Mapping[int, nn.Module], *, packed: bool = False) -> None:
        AttentionInterface.register(DENSE, _dense_attention)
        AttentionInterface.register(PACKED, _packed_attention)
        self._modules = dict(attention_modules)
        for module in self._modules.values():
            # All modules of a tower share one config, which names the attention function: a marked module
            # gets its own. Not the public setter, which asks the model for permission.
            config: Any = copy.copy(module.config)
            config._attn_implementation_internal = PACKED if packed else DENSE
            module.config = config

    @contextmanager
    def recording(
        self, layers: Collection[int], *, first_rows: dict[int, Tensor] | None = None
    ) -> Iterator[dict[int, Tensor]]:
        """Scores by layer, filled by one forward that this thread runs inside the block.

        first_rows  # filled likewise, where given: {layer: (B, N) float32}, see `first_row`; not when packed
        yields      # {layer: (B, N) float32}; of a packed sequence (1, n), in the order of its rows

        Raises `InvalidInput` for a layer that was not given at construction. Raises `Unsupported`, from the
        forward, where attention is masked: no tower here masks, and the scores would be wrong.
        """
        if unknown := set(layers) - self._modules.keys():
            raise InvalidInput(
                f"no scores for layer {min(unknown)}; available: {sorted(self._modules)}", field="layers"
            )
        scores: dict[int, Tensor] = {}
        layer_of = {self._modules[layer]: layer for layer in layers}
        token = _recording.set(_Recording(layer_of, scores, first_rows))
        try:
            yield scores
        finally:
            _recording.reset(token)


def _recorded(module: nn.Module, attention_mask: Tensor | None) -> tuple[_Recording, int] | None:
    """Where this call's scores go, and under which layer; None: nobody asks. Raises Unsupported."""
    recording = _recording.get()
    if recording is None or module not in recording.layer_of:
        return None
    if attention_mask is not None:
        raise Unsupported("scores of masked attention")
    return recording, recording.layer_of[module]


def _dense_attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, N, d)
    key: Tensor,  # (B, heads, N, d)
    value: Tensor,  # (B, heads, N, d)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, and the scores of `module` where they are asked for."""
    if (place := _recorded(module, attention_mask)) is not None:
        recording, layer = place
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        with note(layer):
            recording.scores[layer] = column_sums(query, key, scaling=factor)
            if recording.first_rows is not None:
                recording.first_rows[layer] = first_row(query, key, scaling=factor)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output


def _packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, n, d)
    key: Tensor,  # (1, heads, n, d)
    value: Tensor,  # (1, heads, n, d)
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,  # (S + 1,) int32
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each segment, and the scores of `module` where they are asked for."""
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (n, heads, d)
    output, log_sums = segments.attend(
        queries, keys, values, cu_seq_lens_q, longest=max_length_q, scaling=scaling
    )
    if (place := _recorded(module, attention_mask)) is not None:
        recording, layer = place
        with note(layer):
            sums = packed_column_sums(
                queries, keys, cu_seq_lens_q, scaling=scaling, longest=max_length_q, log_sums=log_sums
            )
        recording.scores[layer] = sums.unsqueeze(0)
    return output.unsqueeze(0), None  # (1, n, heads, d)
