"""LLaVA-1.5, language side: a two-layer projector, and one row for each kept token where the image stood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from hiprune.checkpoints import Checkpoint
from hiprune.errors import InvalidInput
from hiprune.language_part import LAYOUTS, language_config
from hiprune.loading import load_module
from services.llm.families import LanguagePart, SplicedPrompt, splice_rows
from services.llm.placement import Placement
from services.llm.visual import VisualTokens

PROJECTOR_PREFIXES: Final = ("multi_modal_projector.", "model.multi_modal_projector.")


class LlavaAdapter:
    """The projector and the splice rule. Holds the projector's weights and no others."""

    video_token_id = None

    def __init__(
        self,
        projector: torch.nn.Module,
        language: LanguagePart,
        image_token_id: int,
        placement: Placement,
    ) -> None:
        self.language = language
        self.image_token_id = image_token_id
        self._projector = projector
        self._placement = placement

    def check(self, media: VisualTokens) -> None:
        """One view an image, no token outside its grid."""
        if len(media.views) != 1:
            raise InvalidInput(f"has {len(media.views)} views, expected 1", field=f"{media.field}.views")
        if media.views[0].prefix is not None:
            raise InvalidInput(
                "is set, but the llava family keeps no token outside the grid",
                field=f"{media.field}.views[0].prefix_features",
            )

    @torch.no_grad()
    def project(self, media: VisualTokens) -> torch.Tensor:
        """(K, D) to (K, H)."""
        features = media.views[0].features.to(self._placement.device, self._placement.dtype)
        projected: torch.Tensor = self._projector(features[None])[0]
        return projected

    def splice(
        self,
        token_ids: Sequence[int],
        embeddings: torch.Tensor,
        rows: Sequence[torch.Tensor],
        media: Sequence[VisualTokens],
    ) -> SplicedPrompt:
        """One row for each kept token where the image token stood."""
        return splice_rows(token_ids, embeddings, rows, {self.image_token_id})


def load(checkpoint: Checkpoint, config: Any, placement: Placement) -> LlavaAdapter:
    """The adapter with its projector. `config` is the checkpoint's LlavaConfig. Raises CheckpointError."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    projector = load_projector(lambda: LlavaMultiModalProjector(config), checkpoint, placement)
    return LlavaAdapter(projector, language_part(config), int(config.image_token_id), placement)


def load_projector(
    make: Callable[[], torch.nn.Module], checkpoint: Checkpoint, placement: Placement
) -> torch.nn.Module:
    """The projector that `make` builds, with the checkpoint's weights. Raises CheckpointError."""
    return load_module(
        make,
        checkpoint.path,
        PROJECTOR_PREFIXES,
        part="projector",
        device=placement.device,
        dtype=placement.dtype,
    )


def language_part(config: Any) -> LanguagePart:
    """The language model of a checkpoint whose text part is a causal model of its own class."""
    from transformers import AutoModelForCausalLM

    return LanguagePart(AutoModelForCausalLM, language_config(config), LAYOUTS)
