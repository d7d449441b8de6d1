"""The images of a request as bytes: those that came in it, in base64, and those that are fetched.

Knows no pixels: what is in a file is the encoder's to judge.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
from collections.abc import Sequence
from typing import Final

from hiprune.errors import InvalidInput
from services.gateway.chat import ImageSlot
from services.gateway.fetch import MEDIA_TYPES, Fetcher
from services.gateway.worker import Worker

_SHOWN: Final = 40
_PIECE: Final = 2**20
"""Characters of base64 that are decoded at a time, groups of four: the interpreter is held for each, and a
copy is made."""


def is_remote(url: str) -> bool:
    """Whether an image would have to be fetched."""
    return url[:5].lower() != "data:"


async def load(slots: Sequence[ImageSlot], fetcher: Fetcher, worker: Worker, max_bytes: int) -> list[bytes]:
    """The images, in order; those to fetch all at once. The first error ends the others' work.

    Raises InvalidInput.
    """
    fetching = {
        place: asyncio.create_task(fetcher.fetch(slot.url, slot.field))
        for place, slot in enumerate(slots)
        if is_remote(slot.url)
    }
    try:
        inline = {
            place: await worker.run(
                len(slot.url), functools.partial(read_data_url, slot.url, slot.field, max_bytes)
            )
            for place, slot in enumerate(slots)
            if place not in fetching
        }
        await asyncio.gather(*fetching.values())
    finally:
        for task in fetching.values():
            task.cancel()
    return [inline[place] if place in inline else fetching[place].result() for place in range(len(slots))]


def read_data_url(url: str, field: str, max_bytes: int) -> bytes:
    """The file in a `data:image/png;base64,…` URL. Raises InvalidInput.

    Its size is known, and held against the bound, before anything is decoded.
    """
    head, comma, encoded = url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma or len(head) > _SHOWN or [each.strip() for each in parameters] != ["base64"]:
        raise InvalidInput("is no data: URL of an image, expected data:image/png;base64,…", field=field)
    if kind.strip() not in MEDIA_TYPES:
        raise InvalidInput(f"is of type {kind!r}, expected one of {', '.join(MEDIA_TYPES)}", field=field)
    size = len(encoded) // 4 * 3 - encoded[-2:].count("=")
    if size > max_bytes:
        raise InvalidInput(
            f"{size} bytes, expected at most {max_bytes}", reason="LIMIT_EXCEEDED", field=field
        )
    try:
        if 0 <= encoded.find("=") < len(encoded) - 2:
            raise binascii.Error("goes on after its end")
        return b"".join(
            base64.b64decode(encoded[start : start + _PIECE], validate=True)
            for start in range(0, len(encoded), _PIECE)
        )
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise InvalidInput("is not base64", reason="IMAGE_UNREADABLE", field=field) from error
