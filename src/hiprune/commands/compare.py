"""`hiprune compare`: one image under several methods and budgets, on one contact sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hiprune.client import DEFAULT_ADDRESS, DEFAULT_PRUNER_ADDRESS
from hiprune.commands import options
from hiprune.commands.options import (
    Address,
    AsJson,
    Authority,
    Certificate,
    CertificateKey,
    Connection,
    Key,
    PrunerAddress,
    Timeout,
    out,
)
from hiprune.policies import METHODS
from hiprune.results import Answer, Pruned
from hiprune.v1 import pruner_service_pb2

if TYPE_CHECKING:
    from PIL.Image import Image

_WHOLE = ("", "")
"""The cell of all tokens, which is in no row."""
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Cells:
    """What each method gave at each budget; the answers are empty where nothing was asked."""

    pruned: Mapping[Cell, Pruned]
    answers: Mapping[Cell, Answer]


def compare(
    image: Annotated[Path, typer.Argument(help="a JPEG, PNG, WebP or GIF file", exists=True, dir_okay=False)],
    question: Annotated[
        str, typer.Option(help="also answer this, and say where the answer is not that of all tokens")
    ] = "",
    methods: Annotated[
        str, typer.Option(help=f"the rows, separated by commas: {', '.join(METHODS)}")
    ] = "hiprune,hiprune++,random",
    keeps: Annotated[
        str,
        typer.Option(help="the columns, separated by commas: shares (1/3, 33%) or numbers of tokens (65)"),
    ] = "1/2,1/3,1/5,1/10",
    sheet: Annotated[Path, typer.Option("--out", help="the picture to write")] = Path("compare.png"),
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    pruner: PrunerAddress = DEFAULT_PRUNER_ADDRESS,
    key: Key = "",
    tls_ca: Authority = "",
    tls_cert: Certificate = "",
    tls_key: CertificateKey = "",
    timeout: Timeout = 60.0,
) -> None:
    """Draws what each method keeps of an image at each budget and, with a question, what it answers."""
    rows, columns = _listed(methods, "--methods"), _listed(keeps, "--keeps")
    policies = {
        (row, keep): options.policy_of(row, keep, "--methods", "--keeps") for row in rows for keep in columns
    }
    options.check_words(question, "--question")
    options.check_picture(sheet, "--out")
    if question:
        options.required(address, "--address")
    else:
        options.required(pruner, "--pruner")
    connection = Connection.of(
        address=address,
        pruner=pruner,
        key=key,
        tls=(tls_ca, tls_cert, tls_key),
        timeout_s=timeout,
        as_json=as_json,
    )
    data = image.read_bytes()
    asked = {_WHOLE: options.policy_of("none", "1/1"), **policies}
    found = options.run(_all(connection, data, question, asked), as_json=as_json)
    drawn = _draw(data, found, rows, columns, title=image.name, question=question)
    with options.writing(sheet, as_json=as_json):
        drawn.save(sheet)
    if as_json:
        options.print_json(_content(found, image, question, sheet))
        return
    whole = found.pruned[_WHOLE]
    out.print(
        f"{image}: {len(policies)} ways to keep some of {whole.tokens_before} tokens, drawn in {sheet}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if question:
        same = sum(_agrees(found, cell) is True for cell in policies)
        out.print(
            f"all tokens answer {found.answers[_WHOLE].text.strip()!r}; so do {same} of {len(policies)}",
            markup=False,
            highlight=False,
        )


async def _all(
    connection: Connection,
    image: bytes,
    question: str,
    policies: Mapping[Cell, pruner_service_pb2.PrunePolicy],
) -> Cells:
    """Every cell, one after the other, a bar moving."""
    pruned: dict[Cell, Pruned] = {}
    answers: dict[Cell, Answer] = {}
    with options.progress() as bar:
        task = bar.add_task("asking" if question else "pruning", total=len(policies))
        async with connection.client() as client:
            for cell, policy in policies.items():
                if question:
                    answers[cell] = await client.ask(question, image, policy=policy)
                    (pruned[cell],) = answers[cell].media
                else:
                    pruned[cell] = await client.prune(image, policy=policy)
                bar.advance(task)
    return Cells(pruned, answers)


def _draw(
    image: bytes,
    found: Cells,
    rows: list[str],
    columns: list[str],
    *,
    title: str,
    question: str,
) -> Image:
    from hiprune.overlay import describe
    from hiprune.sheet import Tile, draw_sheet

    def tile(cell: Cell) -> Tile:
        pruned = found.pruned[cell]
        return Tile(
            pruned.views[0].selection,
            pruned.tokens_before,
            pruned.tokens_kept,
            found.answers[cell].text if question else None,
            _agrees(found, cell) if cell != _WHOLE else None,
            pruned.is_tiled,
        )

    whole = found.pruned[_WHOLE]
    note = describe(len(whole.views), tiled=whole.is_tiled)

    return draw_sheet(
        image,
        {cell: tile(cell) for cell in found.pruned if cell != _WHOLE},
        methods=rows,
        keeps=columns,
        title=f"{title}, {note}" if note else title,
        question=question,
        whole=tile(_WHOLE),
    )


def _content(found: Cells, image: Path, question: str, sheet: Path) -> dict[str, Any]:
    """For `--json`."""

    def entry(cell: Cell) -> dict[str, Any]:
        asked: dict[str, Any] = {}
        if question:
            answer = found.answers[cell]
            asked = {
                "answer": answer.text,
                "agrees": _agrees(found, cell),
                "first_text_s": round(answer.first_text_s, 6),
                "total_s": round(answer.total_s, 6),
            }
        return {"keep": cell[1] or "100%", **asked, **found.pruned[cell].as_json()}

    return {
        "image": str(image),
        "question": question,
        "sheet": str(sheet),
        "whole": entry(_WHOLE),
        "cells": [entry(cell) for cell in found.pruned if cell != _WHOLE],
    }


def _agrees(found: Cells, cell: Cell) -> bool | None:
    """Whether a cell's answer is that of all tokens; None where nothing was asked."""
    if not found.answers:
        return None
    return found.answers[cell].text.strip() == found.answers[_WHOLE].text.strip()


def _listed(text: str, hint: str) -> list[str]:
    """The items between commas, each once, in their order. Raises BadParameter for none."""
    items = list(dict.fromkeys(each.strip().lower() for each in text.split(",") if each.strip()))
    if not items:
        raise typer.BadParameter("is empty, expected items separated by commas", param_hint=hint)
    return items
