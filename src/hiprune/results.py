"""What the client gives back, typed, and the views that it takes: frozen, in people's words.

Made of the wire's messages, which stay at hand where something else reads them. Knows no call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hiprune.arrays import Array, ArrayLike
from hiprune.policies import CACHE_WORDS, KIND_WORDS, METHOD_WORDS
from hiprune.v1 import encoder_service_pb2, llm_service_pb2, pruner_service_pb2, tensor_pb2

Region = tuple[int, int, int, int]
"""A rectangle of a grid: first row, first column, rows, columns."""
_VALID: Final = ("top", "left", "height", "width")
_TILED: Final = ("original_height", "original_width", "tile_rows", "tile_columns")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One grid of visual tokens that a caller brings, of any encoder: N = H·W tokens, row by row.

    What is left out is not needed for what is asked: without `features` the answer has indices alone, without
    `attention` the methods that read it are refused, `aligned` is what a question is compared with.
    """

    grid: tuple[int, int]
    """Rows and columns, (H, W)."""
    attention: Mapping[int, ArrayLike] = field(default_factory=dict)
    """Scores (N,) by encoder layer, from 1 on: how much attention each token receives; float, at least 0."""
    features: ArrayLike | None = None
    """(N, D), float32, float16 or bfloat16."""
    prefix_features: ArrayLike | None = None
    """(P, D): tokens outside the grid, such as a kept CLS."""
    aligned: ArrayLike | None = None
    """(N, A): each token in the text's space."""
    frame: int = 0
    valid: Region | None = None
    """The part of the grid that shows the image; None: all of it. The rest is padding and never kept."""
    cls_attention: Mapping[int, ArrayLike] = field(default_factory=dict)
    """Scores (N,) by layer of `attention`: CLS's own attention to each token, for visionzip."""


@dataclass(frozen=True, slots=True)
class EncodedView:
    """One grid of visual tokens, as the encoder made it: N = H·W tokens, row by row."""

    grid: tuple[int, int]
    """Rows and columns, (H, W)."""
    attention: Mapping[int, Array]
    """Scores (N,), float32, by layer: those that were asked for."""
    features: Array
    """(N, D), in the tower's dtype, before the projector."""
    prefix_features: Array | None
    """(P, D): tokens outside the grid; None where the family has none."""
    aligned: Array | None
    """(N, A), float16, normalised: each token in the paired text encoder's space; None unless asked for."""
    frame: int
    valid: Region | None
    cls_attention: Mapping[int, Array]
    """CLS's own attention to each token (N,), float32, by layer; empty where the tower has no CLS."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded image or video, and which tower made it."""

    views: tuple[EncodedView, ...]
    family: str
    vision_digest: str
    """Of the tower: two services with equal digests hold the same one."""
    layers: int
    """Encoder layers of the checkpoint, L."""
    timings_ms: Mapping[str, float]
    layout: encoder_service_pb2.MediaLayout = field(repr=False)

    @classmethod
    def read(cls, message: encoder_service_pb2.EncodeImageResponse) -> Encoded:
        """Of an answer of the encoder's. Raises Internal for one that does not hold what it says."""
        return cls(
            views=tuple(_encoded_view(view) for view in message.views),
            family=message.fingerprint.family,
            vision_digest=message.fingerprint.vision_digest,
            layers=message.fingerprint.layers,
            timings_ms=milliseconds(message.timings),
            layout=message.layout,
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """What a choice was made from, each (N,) float32; None where the method does not use it."""

    object: Array | None
    deep: Array | None
    similarity: Array | None
    cls: Array | None


@dataclass(frozen=True, slots=True)
class PrunedView:
    """What is left of one view: K of N = H·W tokens."""

    grid: tuple[int, int]
    """Rows and columns before pruning, (H, W)."""
    kept_indices: tuple[int, ...]
    """Row-major, ascending, K of them; tokens outside the grid left out."""
    kinds: tuple[str, ...]
    """Why each was kept, in the same order: anchor, buffer, register, text, control, dominant or diverse."""
    frame: int
    valid: Region | None
    features: Array | None
    """(K, D), dtype as encoded; None in the report of an answer, and where the caller sent none."""
    prefix_features: Array | None
    scores: Scores | None
    """Where the policy asked for them."""
    selection: pruner_service_pb2.Selection = field(repr=False)
    """The same as the wire has it: what `hiprune.overlay` draws."""

    @property
    def counts(self) -> dict[str, int]:
        """How many were kept of each kind."""
        return dict(Counter(self.kinds))


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned image or video: its views, what was asked for and what came of it."""

    views: tuple[PrunedView, ...]
    method: str
    tokens_before: int
    """Padding left out, tokens outside the grid counted, as in the other two."""
    tokens_requested: int
    tokens_kept: int
    cache: str
    """Which level answered: miss, encoded hit or pruned hit; unspecified where nothing was looked up."""
    deep_layer: int
    text_model: str
    """What the question was compared by; empty where it was not."""
    text_note: str
    """Why no token was chosen by text under hiprune++; empty otherwise."""
    timings_ms: Mapping[str, float]
    policy: pruner_service_pb2.PrunePolicy = field(repr=False)
    """With every default filled in."""
    message: pruner_service_pb2.PrunedMedia | None = field(default=None, repr=False)
    """Of `Client.prune`: what `GenerateText` takes."""
    layout: encoder_service_pb2.MediaLayout = field(
        default_factory=encoder_service_pb2.MediaLayout, repr=False
    )
    """How the views make up the image or video; empty for tokens that the caller brought."""

    @property
    def is_tiled(self) -> bool:
        """Whether the first view is the whole image, squeezed into its grid, and the others are tiles."""
        return self.layout.tile_rows > 0

    @classmethod
    def of_image(cls, message: pruner_service_pb2.PruneImageResponse) -> Pruned:
        """Of an answer of PruneImage. Raises Internal for one that does not hold what it says."""
        media = message.media
        views = tuple(_pruned_view(view) for view in media.views)
        return cls._of(views, media.summary, message.cache, message.timings, media.layout, media)

    @classmethod
    def of_tokens(cls, message: pruner_service_pb2.PruneTokensResponse) -> Pruned:
        """Of an answer of PruneTokens. Raises Internal for one that does not hold what it says."""
        views = tuple(_pruned_view(view) for view in message.views)
        return cls._of(views, message.summary, pruner_service_pb2.CACHE_STATUS_UNSPECIFIED, message.timings)

    @classmethod
    def of_report(cls, message: llm_service_pb2.MediaReport) -> Pruned:
        """Of one media item of an answer's report, which has no features."""
        views = tuple(
            _pruned_view(pruner_service_pb2.PrunedView(selection=view), "llm") for view in message.views
        )
        return cls._of(views, message.summary, message.cache, message.timings, message.layout)

    @classmethod
    def _of(
        cls,
        views: tuple[PrunedView, ...],
        summary: pruner_service_pb2.PruneSummary,
        cache: pruner_service_pb2.CacheStatus.ValueType,
        timings: Iterable[encoder_service_pb2.StageTiming],
        layout: encoder_service_pb2.MediaLayout | None = None,
        message: pruner_service_pb2.PrunedMedia | None = None,
    ) -> Pruned:
        return cls(
            views=views,
            method=METHOD_WORDS.get(summary.policy.method, str(summary.policy.method)),
            tokens_before=summary.tokens_before,
            tokens_requested=summary.tokens_requested,
            tokens_kept=summary.tokens_kept,
            cache=CACHE_WORDS.get(cache, str(cache)),
            deep_layer=summary.deep_layer,
            text_model=summary.text_model,
            text_note=summary.text_note,
            timings_ms=milliseconds(timings),
            policy=summary.policy,
            message=message,
            layout=layout or encoder_service_pb2.MediaLayout(),
        )

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`: what was kept and why, without features and scores. Keys as over HTTP."""
        return {
            "method": self.method,
            "tokens_before": self.tokens_before,
            "tokens_requested": self.tokens_requested,
            "tokens_kept": self.tokens_kept,
            "cache": self.cache,
            **({"text_note": self.text_note} if self.text_note else {}),
            **({"layout": {name: getattr(self.layout, name) for name in _TILED}} if self.is_tiled else {}),
            "views": [
                {
                    "grid_height": view.grid[0],
                    "grid_width": view.grid[1],
                    "kept_indices": list(view.kept_indices),
                    "kinds": list(view.kinds),
                    **({"frame": view.frame} if view.frame else {}),
                    **({"valid": dict(zip(_VALID, view.valid, strict=True))} if view.valid else {}),
                }
                for view in self.views
            ],
            "timings_ms": dict(self.timings_ms),
        }


@dataclass(slots=True)
class Answer:
    """A whole answer. `report` says what was kept, `completion` how it ended and what it took.

    `first_text_s` and `total_s` are seconds from the call to the first text and to the end, as seen here.
    """

    text: str = ""
    report: llm_service_pb2.PruningReport = field(default_factory=llm_service_pb2.PruningReport)
    completion: llm_service_pb2.Completion = field(default_factory=llm_service_pb2.Completion)
    first_text_s: float = 0.0
    total_s: float = 0.0

    @property
    def media(self) -> tuple[Pruned, ...]:
        """What was kept of each image or video of the question, in their order."""
        return tuple(Pruned.of_report(each) for each in self.report.media)

    @property
    def tokens_before(self) -> int:
        """Visual tokens before pruning, over all media."""
        return self.completion.usage.visual_tokens_before

    @property
    def tokens_kept(self) -> int:
        """Visual tokens that the language model read."""
        return self.completion.usage.visual_tokens_after


def milliseconds(timings: Iterable[encoder_service_pb2.StageTiming]) -> dict[str, float]:
    """Time by stage, in milliseconds; stages of one name add up."""
    found: dict[str, float] = {}
    for timing in timings:
        spent = timing.duration.ToMicroseconds() / 1000
        found[timing.stage] = round(found.get(timing.stage, 0.0) + spent, 3)
    return found


def _encoded_view(view: encoder_service_pb2.View) -> EncodedView:
    return EncodedView(
        grid=(view.grid_height, view.grid_width),
        attention={each.layer: Array.read(each.scores, peer="encoder") for each in view.attention},
        features=Array.read(view.features, peer="encoder"),
        prefix_features=_optional(view, "prefix_features", "encoder"),
        aligned=_optional(view, "aligned", "encoder"),
        frame=view.frame,
        valid=_region(view),
        cls_attention={
            each.layer: Array.read(each.cls_scores, peer="encoder")
            for each in view.attention
            if each.HasField("cls_scores")
        },
    )


def _pruned_view(view: pruner_service_pb2.PrunedView, peer: str = "pruner") -> PrunedView:
    chosen = view.selection
    scores = None
    if chosen.HasField("scores"):
        names = ("object", "deep", "similarity", "cls")
        scores = Scores(*(_optional(chosen.scores, name, peer) for name in names))
    return PrunedView(
        grid=(chosen.grid_height, chosen.grid_width),
        kept_indices=tuple(chosen.kept_indices),
        kinds=tuple(KIND_WORDS.get(kind, str(kind)) for kind in chosen.kinds),
        frame=chosen.frame,
        valid=_region(chosen),
        features=_optional(view, "features", peer),
        prefix_features=_optional(view, "prefix_features", peer),
        scores=scores,
        selection=chosen,
    )


def _optional(message: Any, name: str, peer: str) -> Array | None:
    if not message.HasField(name):
        return None
    tensor: tensor_pb2.Tensor = getattr(message, name)
    return Array.read(tensor, peer=peer)


def _region(view: encoder_service_pb2.View | pruner_service_pb2.Selection) -> Region | None:
    if not view.HasField("valid"):
        return None
    valid = view.valid
    return valid.top, valid.left, valid.height, valid.width
