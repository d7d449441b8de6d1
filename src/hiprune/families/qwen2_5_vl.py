"""Qwen2.5-VL: images of any size and video, through windows and a 2×2 merger into the language model's space.

The vision encoder ends in the merger, so visual tokens travel as the language model takes them: D is its
width, and there is no projector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from hiprune.families import Facts, UnsupportedModel

VISION_KEYS: Final = re.compile(r"^(?:model\.)?visual\.")
TEXT_KEYS: Final = re.compile(r"model\.(?:language_model\.)?embed_tokens\.weight")

_FULL_BLOCKS: Final = (7, 15, 23, 31)  # what config.json means where it says nothing


def facts(config: Mapping[str, Any]) -> Facts:
    """Facts of a Qwen2.5-VL checkpoint. Raises UnsupportedModel where no block sees a whole image last."""
    vision = config["vision_config"]
    layers = int(vision["depth"])
    # 1-based layers whose attention spans the image; all others look within a window
    whole = sorted(int(index) + 1 for index in vision.get("fullatt_block_indexes", _FULL_BLOCKS))
    if layers not in whole:
        raise UnsupportedModel(
            f"config.json: vision_config.fullatt_block_indexes is {[layer - 1 for layer in whole]}, "
            f"expected the last block, {layers - 1}, among them"
        )
    # Layer 16 of 32 (paper, section 4.1): the middle one. Where that looks within windows, the nearest below
    # it that does not, as object scores compare tokens of the whole image; with none below, the first.
    middle = max(1, layers // 2)
    return Facts(
        family="qwen2_5_vl",
        layers=layers,
        object_layer=max((layer for layer in whole if layer <= middle), default=whole[0]),
        deep_layer=layers,
        hidden_size=int(vision["out_hidden_size"]),
        grid=None,
        vision_keys=VISION_KEYS,
        paired_text_model="",
        takes_video=True,
        ratio_of="view",
        text_keys=TEXT_KEYS,
        compares="features",
    )
