"""Video-LLaVA, language side: LLaVA's projector for both kinds of media, and a row for each kept token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hiprune.checkpoints import Checkpoint
from hiprune.errors import InvalidInput
from hiprune.families.video_llava import FRAMES
from services.llm.families import LanguagePart, SplicedPrompt, splice_rows
from services.llm.families.llava import language_part, load_projector
from services.llm.placement import Placement
from services.llm.visual import VisualTokens


class VideoLlavaAdapter:
    """The projector and the splice rule. Holds the projector's weights and no others."""

    def __init__(
        self,
        projector: torch.nn.Module,
        language: LanguagePart,
        image_token_id: int,
        video_token_id: int,
        placement: Placement,
    ) -> None:
        self.language = language
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self._projector = projector
        self._placement = placement

    def check(self, media: VisualTokens) -> None:
        """An image is one view of its grid alone; a video 8, each with its frame's CLS."""
        is_video = media.layout.video
        views, prefix = (FRAMES, 1) if is_video else (1, 0)
        kind = "a video" if is_video else "an image"
        if len(media.views) != views:
            raise InvalidInput(
                f"has {len(media.views)} views, expected {views} for {kind}", field=f"{media.field}.views"
            )
        for number, view in enumerate(media.views):
            found = 0 if view.prefix is None else len(view.prefix)
            if found != prefix:
                raise InvalidInput(
                    f"holds {found} tokens outside the grid, expected {prefix} for {kind}",
                    field=f"{media.field}.views[{number}].prefix_features",
                )

    @torch.no_grad()
    def project(self, media: VisualTokens) -> torch.Tensor:
        """(R, H): frame by frame, its CLS first, then its kept tokens: stock's order."""
        pieces = []
        for view in media.views:
            pieces += [view.features] if view.prefix is None else [view.prefix, view.features]
        features = torch.cat([piece.to(self._placement.device, self._placement.dtype) for piece in pieces])
        projected: torch.Tensor = self._projector(features[None])[0]  # (R, D) to (R, H)
        return projected

    def splice(
        self,
        token_ids: Sequence[int],
        embeddings: torch.Tensor,
        rows: Sequence[torch.Tensor],
        media: Sequence[VisualTokens],
    ) -> SplicedPrompt:
        """One row for each kept token where the image or video token stood."""
        return splice_rows(token_ids, embeddings, rows, {self.image_token_id, self.video_token_id})


def load(checkpoint: Checkpoint, config: Any, placement: Placement) -> VideoLlavaAdapter:
    """The adapter with its projector. `config` is a VideoLlavaConfig. Raises CheckpointError."""
    from transformers.models.video_llava.modeling_video_llava import VideoLlavaMultiModalProjector

    projector = load_projector(lambda: VideoLlavaMultiModalProjector(config), checkpoint, placement)
    return VideoLlavaAdapter(
        projector,
        language_part(config),
        # the config's own names: aliases of them came and went
        int(config.image_token_index),
        int(config.video_token_index),
        placement,
    )
