"""LLaVA-1.5, language side: a two-layer projector, and one row for each kept token where the image stood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from hiprune.checkpoints import Checkpoint, CheckpointError
from services.llm.families import SplicedPrompt
from services.llm.placement import Placement
from services.llm.weights import read_tensors

# the three layouts in which checkpoints of this family are stored
LANGUAGE_KEYS: Final[Mapping[str, str]] = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head": "lm_head",
    r"^model\.language_model\.": "model.",
}
_PROJECTOR_PREFIXES: Final = ("multi_modal_projector.", "model.multi_modal_projector.")


class LlavaAdapter:
    """The projector and the splice rule. Holds the projector's weights and no others."""

    language_keys = LANGUAGE_KEYS
    views = 1
    takes_video = False

    def __init__(self, projector: torch.nn.Module, image_token_id: int, placement: Placement) -> None:
        self._projector = projector
        self._image_token_id = image_token_id
        self._placement = placement

    @torch.no_grad()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(K, D) to (K, H). One media item alone, so that no answer depends on its neighbours' sizes."""
        placed = features.to(self._placement.device, self._placement.dtype)
        projected: torch.Tensor = self._projector(placed[None])[0]
        return projected

    def splice(
        self, token_ids: Sequence[int], embeddings: torch.Tensor, media: Sequence[torch.Tensor]
    ) -> SplicedPrompt:
        """Each image token gives way to its rows; positions count on over them, from 0 to S-1."""
        pieces: list[torch.Tensor] = []
        rows = iter(media)
        start = 0
        for index, token_id in enumerate(token_ids):
            if token_id == self._image_token_id:
                pieces += [embeddings[start:index], next(rows)]
                start = index + 1
        pieces.append(embeddings[start:])
        spliced = torch.cat(pieces)  # (S, H)
        return SplicedPrompt(
            embeddings=spliced,
            positions=torch.arange(len(spliced), device=spliced.device),
            visual_tokens=sum(len(each) for each in media),
        )


def load(checkpoint: Checkpoint, config: Any, placement: Placement) -> LlavaAdapter:
    """The adapter with its projector. `config` is the checkpoint's LlavaConfig. Raises CheckpointError."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    with torch.device("meta"):
        projector: torch.nn.Module = LlavaMultiModalProjector(config)
    expected = projector.state_dict()
    stored = read_tensors(
        checkpoint.path,
        {name: [prefix + name for prefix in _PROJECTOR_PREFIXES] for name in expected},
        part="projector",
    )
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{checkpoint.path}: projector: {name} has shape {tuple(tensor.shape)}, "
                f"config.json says {tuple(expected[name].shape)}"
            )
    placed = {name: tensor.to(placement.device, placement.dtype) for name, tensor in stored.items()}
    projector.load_state_dict(placed, assign=True)
    return LlavaAdapter(projector.eval().requires_grad_(False), int(config.image_token_id), placement)
