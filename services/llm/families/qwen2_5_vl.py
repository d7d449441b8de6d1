"""Qwen2.5-VL, language side: no projector, and 3-D positions (M-RoPE) that pruning leaves as they were."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)

from hiprune.checkpoints import Checkpoint
from hiprune.errors import InvalidInput
from services.llm.families import LanguagePart, SplicedPrompt, splice_rows
from services.llm.placement import Placement
from services.llm.visual import VisualTokens

# `model.layers…` in the layout of the hub, `model.language_model.layers…` in transformers' own
LANGUAGE_KEYS: Final[Mapping[str, str]] = {r"^model\.(?!language_model\.|visual\.)": "model.language_model."}

_TEXT, _IMAGE, _VIDEO = range(3)
"""What transformers calls token types."""
_MOST_TOKENS: Final = 2**20
"""Of a conversation before pruning: positions are counted out token by token."""
_MOST_SECONDS: Final = 1e9
"""Of a slice; a longer one would leave the range of a position."""


class QwenLanguageModel(Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """The stock model without its vision tower, so that none of its weights are looked for."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.model.visual


class QwenAdapter:
    """Positions and the splice rule. Holds no weights: features arrive in the model's own space."""

    def __init__(self, config: Any, placement: Placement) -> None:
        language = copy.deepcopy(config)
        language.vision_config.depth = 0
        self.language = LanguagePart(QwenLanguageModel, language, LANGUAGE_KEYS)
        self.image_token_id = int(config.image_token_id)
        self.video_token_id = int(config.video_token_id)
        self._placeholders = {self.image_token_id, self.video_token_id}
        self._merge = int(config.vision_config.spatial_merge_size)
        self._placement = placement
        # transformers' own rule for positions is a method of its model: one without layers or storage does
        bare = copy.deepcopy(language)
        bare.text_config.num_hidden_layers = 0
        bare.text_config.layer_types = []
        with torch.device("meta"):
            self._rule = Qwen2_5_VLModel(bare)

    def check(self, media: VisualTokens) -> None:
        """One view an image; a video's slices alike, and a length of time for each."""
        views, seconds = media.views, media.layout.seconds_per_slice
        if not media.layout.video and len(views) != 1:
            raise InvalidInput(f"has {len(views)} views, expected 1", field=f"{media.field}.views")
        if media.layout.video and not 0 < seconds <= _MOST_SECONDS:
            raise InvalidInput(
                f"is {seconds}, expected above 0 and at most {_MOST_SECONDS:g}",
                field=f"{media.field}.layout.seconds_per_slice",
            )
        for index, view in enumerate(views):
            field = f"{media.field}.views[{index}]"
            if view.grid != views[0].grid:
                raise InvalidInput(
                    f"has a grid of {view.grid[0]}×{view.grid[1]}, expected "
                    f"{views[0].grid[0]}×{views[0].grid[1]} as in the first slice",
                    field=f"{field}.selection",
                )
            if view.prefix is not None:
                raise InvalidInput(
                    "is set, but the qwen2_5_vl family keeps no token outside the grid",
                    field=f"{field}.prefix_features",
                )
            if view.valid is not None:
                raise InvalidInput(
                    "is set, but the qwen2_5_vl family has no padding", field=f"{field}.selection.valid"
                )

    def project(self, media: VisualTokens) -> torch.Tensor:
        """(K, D), D being the model's own width H: slices one behind the other."""
        rows = torch.cat([view.features for view in media.views])
        return rows.to(self._placement.device, self._placement.dtype)

    def splice(
        self,
        token_ids: Sequence[int],
        embeddings: torch.Tensor,
        rows: Sequence[torch.Tensor],
        media: Sequence[VisualTokens],
    ) -> SplicedPrompt:
        """One row for each kept token; positions (3, S) are those that it has in the unpruned prompt.

        So are those of the text behind it. Decoding goes on from the last one, as stock `generate` does.
        """
        unpruned: list[int] = []
        types: list[int] = []
        kept: list[torch.Tensor] = []  # where in `unpruned` the rows that remain stand
        waiting = iter(media)
        tokens = len(token_ids) + sum(each.tokens_before for each in media)
        if tokens > _MOST_TOKENS:
            raise InvalidInput(
                f"make {tokens} tokens before pruning, expected at most {_MOST_TOKENS}",
                reason="LIMIT_EXCEEDED",
                field="messages",
            )
        for token_id in token_ids:
            start = len(unpruned)
            if token_id not in self._placeholders:
                unpruned.append(token_id)
                types.append(_TEXT)
                kept.append(torch.tensor([start]))
                continue
            item = next(waiting)
            count = item.tokens_before
            unpruned += [token_id] * count
            types += [_VIDEO if item.layout.video else _IMAGE] * count
            per_view = count // len(item.views)
            kept += [start + index * per_view + view.kept for index, view in enumerate(item.views)]
        positions = self._positions(unpruned, types, media)[:, torch.cat(kept)]  # (3, S)
        spliced = splice_rows(token_ids, embeddings, rows, self._placeholders)
        return dataclasses.replace(spliced, positions=positions.to(self._placement.device))

    def _positions(
        self, token_ids: Sequence[int], types: Sequence[int], media: Sequence[VisualTokens]
    ) -> torch.Tensor:
        """Time, row and column (3, N) of every token before pruning, by the installed transformers' rule."""
        grids: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
        for item in media:
            height, width = item.views[0].grid
            grids[item.layout.video].append((len(item.views), height * self._merge, width * self._merge))
        seconds = [item.layout.seconds_per_slice for item in media if item.layout.video]
        positions: torch.Tensor
        positions, _ = self._rule.get_rope_index(
            torch.tensor([token_ids]),  # (1, N)
            mm_token_type_ids=torch.tensor([types]),  # (1, N)
            image_grid_thw=torch.tensor(grids[False]) if grids[False] else None,
            video_grid_thw=torch.tensor(grids[True]) if grids[True] else None,
            # a float32 tensor, as stock's processor makes it: positions are cut off after a product
            second_per_grid_ts=torch.tensor(seconds) if seconds else None,
        )
        return positions[:, 0]


def load(checkpoint: Checkpoint, config: Any, placement: Placement) -> QwenAdapter:
    """The adapter. `config` is the checkpoint's Qwen2_5_VLConfig; no weight is read."""
    return QwenAdapter(config, placement)
