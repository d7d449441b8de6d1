"""`hiprune prune`: which visual tokens of images are kept, as pictures and as JSON. No language model
runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hiprune.client import DEFAULT_PRUNER_ADDRESS
from hiprune.commands import options
from hiprune.commands.options import (
    Authority,
    Certificate,
    CertificateKey,
    Connection,
    Images,
    Keep,
    Key,
    Method,
    PrunerAddress,
    Question,
    Timeout,
    err,
    out,
)
from hiprune.results import Pruned
from hiprune.v1 import pruner_service_pb2


def prune(
    images: Images,
    method: Method = "hiprune",
    keep: Keep = "1/3",
    question: Question = "",
    folder: Annotated[
        Path,
        typer.Option(
            "--out", help="folder for NAME.kept.png and NAME.kept.json of each image", file_okay=False
        ),
    ] = Path(),
    overlay: Annotated[
        Path | None, typer.Option(help="write the picture here instead; for one image", show_default=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="write the JSON here instead; for one image", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object, and write none to a file unless --report")
    ] = False,
    pruner: PrunerAddress = DEFAULT_PRUNER_ADDRESS,
    key: Key = "",
    tls_ca: Authority = "",
    tls_cert: Certificate = "",
    tls_key: CertificateKey = "",
    timeout: Timeout = 60.0,
) -> None:
    """Prunes images: draws the kept tokens of each, and writes which they are, and why."""
    policy = options.policy_of(method, keep)
    options.check_words(question, "--question")
    for name, path in (("--overlay", overlay), ("--report", report)):
        if path is not None and len(images) > 1:
            raise typer.BadParameter(f"names one file for {len(images)} images: use --out", param_hint=name)
    if overlay is not None:
        options.check_picture(overlay, "--overlay")
    options.check_pillow("--overlay")
    if report is not None:
        options.check_file(report, "--report")
    names = _names(images)
    _make(folder)
    connection = Connection.of(
        pruner=options.required(pruner, "--pruner"),
        key=key,
        tls=(tls_ca, tls_cert, tls_key),
        timeout_s=timeout,
        as_json=as_json,
    )
    found: list[dict[str, Any]] = []

    def keep_result(image: Path, data: bytes, pruned: Pruned) -> None:
        from hiprune.overlay import draw_overlay

        name = names[image]
        picture = overlay or folder / f"{name}.kept.png"
        drawn = draw_overlay(data, pruned.views[0].selection, tiled=pruned.is_tiled, views=len(pruned.views))
        with options.writing(picture, as_json=as_json):
            drawn.save(picture)
        entry = {"image": str(image), "question": question, "overlay": str(picture), **pruned.as_json()}
        found.append(entry)
        file = report or (None if as_json else folder / f"{name}.kept.json")
        if file is not None:
            with options.writing(file, as_json=as_json):
                file.write_text(json.dumps(entry, ensure_ascii=False) + "\n", "utf-8")
        if not as_json:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(_counts(pruned).items()))
            out.print(
                f"{image}: {pruned.tokens_before} → {pruned.tokens_kept} tokens ({kinds}), "
                f"cache {pruned.cache}: {picture}, {file}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            if pruned.text_note:
                err.print(f"[dim]no token was chosen by the question: {pruned.text_note}[/dim]")

    options.run(_prune_all(connection, images, policy, question, keep_result), as_json=as_json)
    if as_json:
        options.print_json({"images": found})


async def _prune_all(
    connection: Connection,
    images: list[Path],
    policy: pruner_service_pb2.PrunePolicy,
    question: str,
    done: Callable[[Path, bytes, Pruned], None],
) -> None:
    """One image after the other, a bar moving where there are several."""
    with options.progress() as bar:
        task = bar.add_task("pruning", total=len(images))
        async with connection.client() as client:
            for image in images:
                data = image.read_bytes()
                done(image, data, await client.prune(data, policy=policy, question=question))
                bar.advance(task)


def _names(images: list[Path]) -> dict[Path, str]:
    """What each image's files are called: as it is, with its ending where two differ in that alone.

    Raises BadParameter for images whose files would be the same.
    """
    stems = Counter(each.stem for each in images)
    names = [each.name if stems[each.stem] > 1 else each.stem for each in images]
    (name, count), *_ = Counter(names).most_common(1)
    if count > 1:
        raise typer.BadParameter(
            f"{count} of them would be written to {name}.kept.png: prune them one after the other, each into "
            "an --out of its own",
            param_hint="IMAGES",
        )
    return dict(zip(images, names, strict=True))


def _counts(pruned: Pruned) -> dict[str, int]:
    """Kept tokens by kind, over all views."""
    found: dict[str, int] = {}
    for view in pruned.views:
        for kind, count in view.counts.items():
            found[kind] = found.get(kind, 0) + count
    return found


def _make(folder: Path) -> None:
    """The folder, made where it is missing. Raises BadParameter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: {error.strerror}", param_hint="--out") from error
    options.check_writable(folder, "--out")
