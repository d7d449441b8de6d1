"""Video-LLaVA: eight frames of a video or one image, each kind through a CLIP tower of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final

from hiprune.families import Facts, llava

FRAMES: Final = 8
"""Frames of every video: what the model was trained on. Other numbers are sampled to it."""

# What is left of a key is its normal name, and both towers have the same: so the image tower's loses the
# dot in front of it and the video tower's keeps it (`encoder.layers.0…`, `.encoder.layers.0…`).
VISION_KEYS: Final = re.compile(
    r"^(?:model\.)?(?:image_tower\.(?:vision_model\.)?|video_tower(?:\.vision_model(?=\.))?(?=\.))"
)
TEXT_KEYS: Final = re.compile(r"(?:language_model\.model|model\.language_model)\.embed_tokens\.weight")


def facts(config: Mapping[str, Any]) -> Facts:
    """Facts of a Video-LLaVA checkpoint: a LLaVA-1.5's with a second tower. Raises UnsupportedModel.

    No text encoder comes with its towers, so questions are compared in the language model's space.
    """
    return dataclasses.replace(
        llava.facts(config),
        family="video_llava",
        vision_keys=VISION_KEYS,
        paired_text_model="",
        takes_video=True,
        fixed_tokens=None,  # an image has H·W tokens, a video 8·(H·W + 1)
        text_keys=TEXT_KEYS,
    )


def sampled_frames(count: int) -> list[int]:
    """Which of `count` ≥ 1 frames stand for a video: evenly spaced, repeated where there are fewer."""
    return [number * count // FRAMES for number in range(FRAMES)]
