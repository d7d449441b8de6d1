"""LLaVA-OneVision: SigLIP, which has no CLS, over a base view and the tiles of an image; images only.

Of several images each is tiled as if it were alone, as the stock processor does with a flat list of images.
(Given the images of a prompt as a nested list, it shows each as one padded square instead.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from hiprune.families import Facts, UnsupportedModel

# the tower, and the projector, which the encoder runs too: what it sends depends on both
VISION_KEYS: Final = re.compile(
    r"^(?:model\.)?(?:vision_tower\.(?:vision_model\.)?|(?=multi_modal_projector\.))"
)
TEXT_KEYS: Final = re.compile(r"(?:model\.)?language_model\.(?:model\.)?embed_tokens\.weight")


def facts(config: Mapping[str, Any]) -> Facts:
    """Facts of a LLaVA-OneVision checkpoint. Raises UnsupportedModel for settings it does not use."""
    vision = config["vision_config"]
    tower = vision.get("model_type", "siglip_vision_model")
    if tower != "siglip_vision_model":
        raise UnsupportedModel(
            f"config.json: vision_config.model_type is {tower!r}, expected 'siglip_vision_model'"
        )
    strategy = config.get("vision_feature_select_strategy", "full")
    if strategy != "full":
        raise UnsupportedModel(
            f"config.json: vision_feature_select_strategy is {strategy!r}, expected 'full' (there is no CLS)"
        )
    layers = int(vision["num_hidden_layers"])
    feature_layer = config.get("vision_feature_layer", -1)
    # hidden_states has L + 1 entries, the embeddings first, so entry i is the output of 1-based layer i
    deep_layer = 0
    if isinstance(feature_layer, int):
        deep_layer = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= deep_layer <= layers:
        raise UnsupportedModel(
            f"config.json: vision_feature_layer is {feature_layer}, expected one layer of the {layers}"
        )
    side = int(vision["image_size"]) // int(vision["patch_size"])
    return Facts(
        family="llava_onevision",
        layers=layers,
        object_layer=min(max(1, round(layers / 2)), deep_layer),
        deep_layer=deep_layer,
        hidden_size=int(vision["hidden_size"]),
        grid=(side, side),
        vision_keys=VISION_KEYS,
        paired_text_model="",
        text_keys=TEXT_KEYS,
        compares="aligned",
    )
