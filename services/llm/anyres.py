"""Images of any resolution, language side: a projector, and how base view and tiles become one run of rows.

Nothing pruned: the stock packing, that is the base view, then the assembled tiles without their padding, row
by row with a newline embedding behind each. Pruned: the base view's kept tokens, then each tile's in raster
order, no newlines; or, with `newlines` "rows", the assembled tiles row by row, a newline behind each row that
keeps a token. Shared by the families that tile; knows no family.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import torch

from hiprune.anyres import Pinpoints, tiling
from hiprune.errors import InvalidInput
from services.llm.families import LanguagePart, SplicedPrompt, splice_rows
from services.llm.placement import Placement
from services.llm.visual import VisualTokens


class AnyresAdapter:
    """The projector, the newline embedding and the packing. Holds those weights and no others."""

    video_token_id = None

    def __init__(
        self,
        projector: torch.nn.Module,
        newline: torch.Tensor,  # (H,)
        language: LanguagePart,
        image_token_id: int,
        placement: Placement,
        *,
        pinpoints: Pinpoints,
        tile: int,
        max_tiles: int | None = None,
    ) -> None:
        """`tile` is a view's side in pixels. Above `max_tiles` tiles' tokens, stock shrinks what is whole."""
        self.language = language
        self.image_token_id = image_token_id
        self._projector = projector
        self._newline = newline.to(placement.device, placement.dtype)
        self._placement = placement
        self._pinpoints = pinpoints
        self._tile = tile
        self._max_tiles = max_tiles
        self._newline_rows = False

    def with_newline_rows(self) -> Self:
        """The same adapter with a newline behind each row of a pruned image that keeps a token."""
        other = copy.copy(self)
        other._newline_rows = True
        return other

    def check(self, media: VisualTokens) -> None:
        """A base view and the tiles of an image of its size, no token outside a grid. Raises InvalidInput."""
        layout, views = media.layout, media.views
        for number, view in enumerate(views):
            if view.prefix is not None:
                raise InvalidInput(
                    "is set, but this family keeps no token outside the grid",
                    field=f"{media.field}.views[{number}].prefix_features",
                )
        count = layout.tile_rows * layout.tile_columns
        if min(layout.tile_rows, layout.tile_columns) < 0 or len(views) != 1 + count:
            raise InvalidInput(
                f"has {len(views)} views, expected a base view and {layout.tile_rows} × "
                f"{layout.tile_columns} tiles",
                field=f"{media.field}.views",
            )
        expected: list[tuple[int, int, int, int]] = [(0, 0, *views[0].grid)]
        if count:
            size = layout.original_height, layout.original_width
            for name, extent in zip(("original_height", "original_width"), size, strict=True):
                if extent < 1:
                    raise InvalidInput(
                        f"is {extent}, expected at least 1", field=f"{media.field}.layout.{name}"
                    )
            tiles = tiling(*size, self._pinpoints, tile=self._tile, side=views[0].grid[0])
            if (layout.tile_rows, layout.tile_columns) != (tiles.rows, tiles.columns):
                raise InvalidInput(
                    f"has {layout.tile_rows} × {layout.tile_columns} tiles, expected {tiles.rows} × "
                    f"{tiles.columns} for an image of {size[0]} × {size[1]} pixels",
                    field=f"{media.field}.layout.tile_rows",
                )
            expected += tiles.valid
        for number, (view, region) in enumerate(zip(views, expected, strict=True)):
            if (view.valid or (0, 0, *view.grid)) != region:
                raise InvalidInput(
                    f"is {view.valid}, expected {region} in this layout",
                    field=f"{media.field}.views[{number}].selection.valid",
                )

    @torch.no_grad()
    def project(self, media: VisualTokens) -> torch.Tensor:
        """ΣK × D to (R, H): the base view's rows, then the tiles'; newlines among them count in R."""
        features = torch.cat([view.features for view in media.views])  # (ΣK, D)
        features = features.to(self._placement.device, self._placement.dtype)
        projected: torch.Tensor = self._projector(features[None])[0]  # (ΣK, H)
        base, tiles = projected.tensor_split([len(media.views[0].kept)])
        if not media.whole and not self._newline_rows:
            return projected
        if len(media.views) == 1:
            return torch.cat((base, self._newline[None])) if media.whole else base
        places = self._places(media).to(tiles.device)  # (T, 2): row, column
        width = int(media.layout.tile_columns) * media.views[0].grid[1]
        order = (places[:, 0] * width + places[:, 1]).argsort()
        tiles = tiles[order]  # (T, H), row-major over the assembled tiles
        if media.whole:
            tiles, lengths = self._whole_rows(tiles, media)
        else:
            counts = places[:, 0].bincount()
            lengths = counts[counts > 0].tolist()  # tokens of each row that keeps any
        pieces = [base]
        for row in torch.split(tiles, lengths) if lengths else ():
            pieces += [row, self._newline[None]]
        return torch.cat(pieces)

    def splice(
        self,
        token_ids: Sequence[int],
        embeddings: torch.Tensor,
        rows: Sequence[torch.Tensor],
        media: Sequence[VisualTokens],
    ) -> SplicedPrompt:
        """The rows of each image where its image token stood. Newlines are text, not visual tokens."""
        prompt = splice_rows(token_ids, embeddings, rows, {self.image_token_id})
        kept = [sum(len(view.kept) for view in each.views) for each in media]
        visual = sum(min(count, len(each)) for count, each in zip(kept, rows, strict=True))
        return dataclasses.replace(prompt, visual_tokens=visual)

    def _places(self, media: VisualTokens) -> torch.Tensor:
        """Row and column, (T, 2), of each kept token of the tiles, in the grid that they make up."""
        places = []
        for number, view in enumerate(media.views[1:]):
            tile_row, tile_column = divmod(number, media.layout.tile_columns)
            rows = view.kept // view.grid[1] + tile_row * view.grid[0]
            columns = view.kept % view.grid[1] + tile_column * view.grid[1]
            places.append(torch.stack((rows, columns), dim=1))
        return torch.cat(places)

    def _whole_rows(self, tokens: torch.Tensor, media: VisualTokens) -> tuple[torch.Tensor, list[int]]:
        """All (h · w, H) tokens that show the image, and the length of each row, as stock packs them.

        Rows may be empty: tiles of an image a few pixels wide are all padding, and stock counts their rows.
        """
        side = media.views[0].grid[0]
        size = media.layout.original_height, media.layout.original_width
        height, width = tiling(*size, self._pinpoints, tile=self._tile, side=side).shown[2:]
        ratio = math.sqrt(height * width / (self._max_tiles * side**2)) if self._max_tiles else 0
        if ratio > 1.1:  # stock's own threshold
            planes = tokens.view(height, width, -1).permute(2, 0, 1).contiguous()  # (H, h, w)
            height, width = int(height // ratio), int(width // ratio)
            shrunk = torch.nn.functional.interpolate(planes[None], [height, width], mode="bilinear")[0]
            tokens = shrunk.flatten(1).T  # (h' · w', H)
        return tokens, [width] * height
