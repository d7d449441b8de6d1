"""The overlay: every kind of token has a colour of its own, and shows where it was kept."""

from __future__ import annotations

from io import BytesIO
from itertools import combinations

from PIL import Image, ImageColor

from hiprune.overlay import COLOURS, draw_overlay
from hiprune.v1 import pruner_service_pb2 as pb


def test_every_kind_has_a_name_and_a_colour_that_is_told_from_all_others():
    assert set(COLOURS) == set(pb.TokenKind.values()) - {pb.TOKEN_KIND_UNSPECIFIED}
    names, colours = zip(*COLOURS.values(), strict=True)
    kinds = [pb.TokenKind.Name(kind).removeprefix("TOKEN_KIND_").lower() for kind in COLOURS]
    assert list(names) == kinds
    for one, other in combinations(map(ImageColor.getrgb, colours), 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) > 60**2


def test_a_kept_patch_has_an_edge_in_its_kinds_colour():
    file = BytesIO()
    Image.new("RGB", (60, 60), "grey").save(file, "PNG")
    kinds = [pb.TOKEN_KIND_DOMINANT, pb.TOKEN_KIND_DIVERSE]
    view = pb.Selection(kept_indices=[0, 4], kinds=kinds, grid_height=3, grid_width=3)
    drawn = draw_overlay(file.getvalue(), view)
    cell = drawn.width // 3
    for index, kind in zip(view.kept_indices, kinds, strict=True):
        row, column = divmod(index, 3)
        assert drawn.getpixel((column * cell, row * cell)) == ImageColor.getrgb(COLOURS[kind][1])
