"""`hiprune bench`: load on a running service, and how long its answers take. A tool, and no claim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hiprune.client import DEFAULT_ADDRESS
from hiprune.commands import options
from hiprune.commands.options import (
    Address,
    AsJson,
    Authority,
    Certificate,
    CertificateKey,
    Connection,
    Images,
    Keep,
    Key,
    Method,
    Timeout,
    err,
    out,
)
from hiprune.load import Plan, Result, run_load
from hiprune.v1 import llm_service_pb2, pruner_service_pb2


def bench(
    images: Images,
    question: Annotated[str, typer.Option(help="what is asked about each image")],
    method: Method = "hiprune",
    keep: Keep = "1/3",
    against: Annotated[
        str,
        typer.Option(
            help="ask every question with this method too, in turns, and give the ratio: none is unpruned",
            autocompletion=options.complete_method,
            show_default=False,
        ),
    ] = "",
    concurrency: Annotated[int, typer.Option(help="requests at a time", min=1, max=4096)] = 1,
    requests: Annotated[
        int | None, typer.Option(help="requests of each method; default: 50, or what --seconds leaves", min=1)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="ask nothing more after so many seconds", min=0.1, show_default=False)
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="pictures that no cache has seen: every request encodes")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="longest answer, in tokens", min=1, max=2**31 - 1)
    ] = None,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    key: Key = "",
    tls_ca: Authority = "",
    tls_cert: Certificate = "",
    tls_key: CertificateKey = "",
    timeout: Timeout = 60.0,
) -> None:
    """Asks a question about images again and again, and shows how long that takes."""
    options.check_words(question, "--question")
    policies = _policies(method, keep, against)
    connection = Connection.of(
        address=options.required(address, "--address"),
        key=key,
        tls=(tls_ca, tls_cert, tls_key),
        timeout_s=timeout,
        as_json=as_json,
    )
    data = [each.read_bytes() for each in images]
    if fresh:
        options.check_pillow("--fresh")
        data = [_png_of(path, each) for path, each in zip(images, data, strict=True)]
    plan = Plan(
        question=question,
        images=data,
        policies=policies,
        sampling=llm_service_pb2.Sampling(max_tokens=max_tokens),
        concurrency=concurrency,
        requests=50 if requests is None and seconds is None else requests,
        seconds=seconds,
        fresh=fresh,
    )
    result = options.run(_run(connection, plan), as_json=as_json)
    if as_json:
        asked = {"concurrency": concurrency, "fresh": fresh, "images": len(images), "address": address}
        options.print_json({**asked, **result.content()})
    else:
        _show(result, concurrency)
    if not any(tally.total_s for tally in result.tallies.values()):
        raise typer.Exit(1)


def _png_of(path: Path, image: bytes) -> bytes:
    """A picture as PNG, which can be given a comment. Raises BadParameter for what is none."""
    from PIL.Image import DecompressionBombError

    from hiprune.load import as_png

    try:
        return as_png(image)
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
        raise typer.BadParameter(f"{path}: is no picture that can be read", param_hint="IMAGES") from error


def _policies(method: str, keep: str, against: str) -> dict[str, pruner_service_pb2.PrunePolicy]:
    """By the names that the table has."""
    named = {_name(method, keep): options.policy_of(method, keep)}
    if against:
        other = _name(against, keep)
        if other in named:
            raise typer.BadParameter("is the method itself, expected another one", param_hint="--against")
        named[other] = options.policy_of(against, keep, "--against")
    return named


def _name(method: str, keep: str) -> str:
    return "none" if method.lower() == "none" else f"{method.lower()} {keep}"


async def _run(connection: Connection, plan: Plan) -> Result:
    total = plan.requests * len(plan.policies) if plan.requests is not None else None
    with options.progress() as bar:
        task = bar.add_task("asking", total=total)
        async with connection.client() as client:
            return await run_load(client, plan, lambda: bar.advance(task))


def _show(result: Result, concurrency: int) -> None:
    content = result.content()
    policies: Mapping[str, Mapping[str, Any]] = content["policies"]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in policies:
        table.add_column(name, justify="right")

    def row(title: str, *cells: str) -> None:
        table.add_row(title, *cells)

    for key, title in (("first_text_ms", "first text"), ("total_ms", "whole answer")):
        for share in ("p50", "p95", "p99"):
            row(f"{title}, {share}, ms", *(_number(each[key].get(share)) for each in policies.values()))
    row(
        "visual tokens",
        *(f"{_number(each['tokens_before'])} → {_number(each['tokens_kept'])}" for each in policies.values()),
    )
    row("cache", *(_counted(each["cache"]) for each in policies.values()))
    row("answers", *(str(each["answers"]) for each in policies.values()))
    row("errors", *(_counted(each["errors"]) for each in policies.values()))
    out.print(table)
    if ratio := content.get("ratio"):
        one, other = policies
        out.print(
            f"{one} against {other}, medians: first text × {_number(ratio['first_text'])}, "
            f"whole answer × {_number(ratio['total'])}",
            markup=False,
            highlight=False,
        )
    answers, tokens = (_number(content[f"{each}_per_s"]) for each in ("answers", "generated_tokens"))
    spent = f"{concurrency} at a time for {content['seconds']:.1f} s"
    out.print(f"{spent}: {answers} answers, {tokens} generated tokens a second", highlight=False)
    err.print("[dim]what else runs on these machines counts; claims are made by benchmarks/[/dim]")


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
