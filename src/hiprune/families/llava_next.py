"""LLaVA-NeXT: LLaVA-1.5's tower over a base view and the tiles of an image of any resolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hiprune.families import Facts, llava


def facts(config: Mapping[str, Any]) -> Facts:
    """Facts of a LLaVA-NeXT checkpoint. Raises UnsupportedModel for feature settings it does not use."""
    # the question is compared through the original CLIP, although the tower was tuned since (paper, 3.3)
    return dataclasses.replace(llava.facts(config), family="llava_next", fixed_tokens=None)
