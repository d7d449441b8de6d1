"""`hiprune evaluate`: what pruning costs in right answers, method by method, on held-out scenes.

A thin skin over `benchmarks.evaluation`, which a checkout has and an installed wheel has not.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer

from hiprune.checkpoints import CheckpointError, open_checkpoint
from hiprune.commands import options
from hiprune.config import EMBEDDED_MODEL, ConfigError
from hiprune.errors import from_rpc
from hiprune.stack import StackError

_MODULE: Final = "benchmarks.evaluation"
_FAMILY: Final = "llava"
_ELSEWHERE: Final = Path("out") / "evaluation"


def evaluate(
    model: Annotated[str, typer.Option(help="a LLaVA-1.5 model trained on scenes")] = str(EMBEDDED_MODEL),
    scenes: Annotated[int, typer.Option(help="held-out pictures, with up to 14 questions each", min=2)] = 320,
    ablation_scenes: Annotated[
        int, typer.Option(help="of these, how many the ablations are tried on; 0: none", min=0)
    ] = 100,
    seed: Annotated[int, typer.Option(help="which scenes; the same ones give the same figures", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="processes; 0: one a core", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for the figures and plots",
            show_default=f"benchmarks/results for the included model, else {_ELSEWHERE}",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, and write no file")] = False,
) -> None:
    """Measures accuracy against retention, every method beside the controls; takes minutes."""
    if importlib.util.find_spec("benchmarks") is None:
        raise typer.BadParameter("is a command of a checkout: the scenes are not part of the package")
    evaluation: Any = importlib.import_module(_MODULE)
    # the services and the processes beside them end with this one, also where it is told to
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        results = _measure(
            evaluation,
            model,
            scenes=scenes,
            ablation_scenes=ablation_scenes,
            seed=seed,
            workers=workers,
        )
    except (CheckpointError, ConfigError) as error:
        raise options.stop(str(error), reason="MODEL", as_json=as_json) from error
    except StackError as error:
        raise options.stop(str(error), reason="NOT_STARTED", as_json=as_json) from error
    except grpc.aio.AioRpcError as error:
        options.fail(from_rpc(error, peer="service"), as_json=as_json)
    if as_json:
        options.print_json(results)
    else:
        included = open_checkpoint(model).path == EMBEDDED_MODEL
        evaluation.publish(results, out or (None if included else _ELSEWHERE))


def _measure(evaluation: Any, model: str, *, scenes: int, **limits: int) -> dict[str, Any]:
    """The results, with progress on standard error. Raises CheckpointError, ConfigError."""
    checkpoint = open_checkpoint(model)
    if checkpoint.facts.family != _FAMILY:
        raise ConfigError(
            f"model (--model): {checkpoint.name} is of the family {checkpoint.facts.family!r}, "
            f"expected {_FAMILY!r}, trained on scenes: no other model knows their words"
        )
    with options.progress() as bar:
        task = bar.add_task("scenes", total=scenes)
        found: dict[str, Any] = evaluation.measure(
            str(checkpoint.path), scenes=scenes, step=lambda: bar.advance(task), **limits
        )
    return found
