"""The overlay: every kind of token has a colour of its own, and shows where it was kept."""

from __future__ import annotations

from io import BytesIO
from itertools import combinations

from PIL import Image, ImageColor

from hiprune.overlay import COLOURS, draw_overlay
from hiprune.results import Pruned
from hiprune.v1 import encoder_service_pb2, llm_service_pb2
from hiprune.v1 import pruner_service_pb2 as pb
from services.gateway.reports import pruning_of


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


def test_a_token_of_the_whole_of_a_tiled_image_lies_where_the_squeezed_image_shows_it():
    file = BytesIO()
    wide = Image.new("RGB", (240, 60), "blue")
    wide.paste("red", (0, 0, 60, 60))  # the left quarter, which a centre crop would cut off
    wide.save(file, "PNG")
    view = pb.Selection(kept_indices=[4], kinds=[pb.TOKEN_KIND_ANCHOR], grid_height=4, grid_width=4)
    squeezed = draw_overlay(file.getvalue(), view, tiled=True, views=5)
    cropped = draw_overlay(file.getvalue(), view)
    cell = squeezed.width // 4
    middle = (cell // 2, cell + cell // 2)
    assert squeezed.getpixel(middle) == (255, 0, 0)
    assert cropped.getpixel(middle) == (0, 0, 255)
    assert squeezed.height > cropped.height  # a line says that it is one view of five


def test_what_was_kept_of_a_tiled_image_has_the_keys_that_it_has_over_http():
    valid = encoder_service_pb2.ValidRegion(top=1, left=0, height=2, width=4)
    grid = {"grid_height": 4, "grid_width": 4}
    views = [pb.Selection(**grid), pb.Selection(**grid, valid=valid)]
    layout = encoder_service_pb2.MediaLayout(
        original_height=60, original_width=240, tile_rows=1, tile_columns=1
    )
    media = llm_service_pb2.MediaReport(views=views, layout=layout)
    found = Pruned.of_report(media)
    assert found.is_tiled
    over_http = pruning_of(llm_service_pb2.PruningReport(media=[media]), detailed=True)["images"][0]
    said = found.as_json()
    assert said["layout"] == over_http["layout"]
    assert said["views"] == over_http["views"]
    assert said["views"][1]["valid"] == {"top": 1, "left": 0, "height": 2, "width": 4}
    frame = llm_service_pb2.MediaReport(views=[pb.Selection(grid_height=1, grid_width=1, frame=3)])
    assert Pruned.of_report(frame).as_json()["views"][0]["frame"] == 3
    assert "layout" not in Pruned.of_report(frame).as_json()
