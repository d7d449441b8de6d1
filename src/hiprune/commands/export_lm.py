"""`hiprune export-lm`: a model's language part as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from hiprune.commands import options
from hiprune.commands.options import AsJson, err, out


def export_lm(
    source: Annotated[Path, typer.Argument(help="directory of a vision-language model")],
    target: Annotated[Path, typer.Argument(help="directory to write; must not be there, or be empty")],
    as_json: AsJson = False,
) -> None:
    """Write a model's language part as a checkpoint of its own, for a vLLM server that runs elsewhere."""
    from hiprune.checkpoints import CheckpointError
    from hiprune.lm_export import export_language_model

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err, disable=as_json) as bar:
            task = bar.add_task("copying")
            made = export_language_model(
                source, target, lambda done, total: bar.update(task, completed=done, total=total)
            )
    except (CheckpointError, OSError) as error:
        if as_json:
            options.print_error(str(error), reason="EXPORT_FAILED")
        else:
            err.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if as_json:
        options.print_json(
            {
                "target": str(target),
                "tensors": made.tensors,
                "copied_bytes": made.copied_bytes,
                "linked_files": made.linked_files,
            }
        )
        return
    out.print(
        f"{target}: {made.tensors} tensors, {made.copied_bytes / 2**20:.1f} MB copied, "
        f"{made.linked_files} files linked"
    )
