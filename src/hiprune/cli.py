"""The `hiprune` command: ask, prune pictures, compare, measure, look after the services. See `commands`.

Exit codes and what `--json` prints are in `commands.options` and docs/cli.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from hiprune.commands import (
    ask,
    bench,
    cache,
    compare,
    doctor,
    evaluate,
    export_lm,
    flops,
    options,
    prune,
    suggest_layer,
    tenants,
    up,
)


class _Group(TyperGroup):
    """Says what is wrong with a command line as JSON, where that is asked for."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options_: Any) -> Any:
        """Runs the command line, and ends the process unless told otherwise."""
        given = list(sys.argv[1:] if args is None else args)
        if not options.wants_json(given) or not options_.get("standalone_mode", True):
            return super().main(args, *rest, **options_)
        try:
            code = super().main(args, *rest, **{**options_, "standalone_mode": False})
        except Exception as error:
            usage = getattr(error, "format_message", None)
            if usage is None:
                raise
            options.print_error(usage(), reason="USAGE")
            code = getattr(error, "exit_code", 2)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Questions about images, answered from a third of the visual tokens.",
)
app.command()(ask.ask)
app.command()(prune.prune)
app.command()(compare.compare)
app.command()(bench.bench)
app.command()(doctor.doctor)
app.command()(up.up)
app.command()(up.demo)
app.command()(flops.flops)
app.command()(evaluate.evaluate)
app.command(name="suggest-layer")(suggest_layer.suggest_layer)
app.command(name="export-lm")(export_lm.export_lm)
app.add_typer(cache.app, name="cache")
app.add_typer(tenants.app, name="tenant")


def main() -> None:
    """Entry point."""
    # gRPC's own log lines are for its developers; errors reach people as HipruneError
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()
