"""Trains the included model from nothing: `python -m models.shapes.train --run DIR`.

Seeded, and resumable: the same command in the same folder goes on where it stopped. `--minutes` ends a
sitting in good order. The checkpoint is written when all steps are done, and at the end of each sitting.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Sampler

from models.shapes import architecture
from models.shapes.batches import HELD_OUT, IGNORED, Batch, Batches
from models.shapes.learner import Learner, Thinning, phrase_texts, things_whole, thinned
from models.shapes.questions import SEVERAL, TYPES

SAVE_EVERY_S: Final = 600
LOOK_EVERY: Final = 100
"""Steps between two looks at held-out scenes."""
WARM_UP: Final = 100
MORE_QUESTIONS: Final = 2
"""How many times as many questions a picture when the language model learns alone: they cost little then."""
LATE_RATE: Final = 0.4
"""Factor on the learning rate from the language model's third round on: it refines."""
HARD_TYPES: Final = (*TYPES, "count", "relation", SEVERAL)
"""What is asked from the language model's second round on: more of what it is slow to learn."""

TOWER_ALONE: Final = 0.26
"""Share of the tower's steps in which it learns alone: before, it has nothing to tell a language model."""
ALL_SEEN: Final = 0.93
"""Share of the tower's steps after which it sees every patch, as it will in service."""
FEW_READ: Final = 0.7
"""Share of the language model's first round in which it reads a third of the tokens at most."""


def main() -> None:
    """Trains, or goes on."""
    options = _options()
    device = torch.device(options.device)
    run = Path(options.run)
    run.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    learner = make_learner().to(device)
    optimizers = make_optimizers(learner, options.learning_rate)
    first = restore(run, learner, optimizers) if (run / "state.json").exists() else 0
    train(learner, optimizers, options, run, first, device)
    learner.eval()
    learner.fold()
    architecture.save(learner.llava.cpu(), learner.clip, run / "checkpoint")
    print(f"checkpoint: {run / 'checkpoint'}")


def make_learner() -> Learner:
    """An untrained one. torch's global seed decides its weights."""
    llava, clip = architecture.build()
    words = architecture.tokenizer()
    ids = [[*words(text)["input_ids"], architecture.EOS] for text in phrase_texts()]
    longest = max(map(len, ids))
    phrases = torch.tensor([each + [architecture.PAD] * (longest - len(each)) for each in ids])
    return Learner(llava, clip, phrases)


def make_optimizers(learner: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else, at one learning rate."""
    matrices, rest = [], []
    for name, parameter in learner.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    learner: Learner,
    optimizers: list[torch.optim.Optimizer],
    options: argparse.Namespace,
    run: Path,
    first: int,
    device: torch.device,
) -> None:
    """Steps `first` to the last, or to the end of the sitting."""
    rounds = (options.steps, *options.language_steps)
    total = sum(rounds)
    held_out = [Batches(HELD_OUT, 32, 14)[number] for number in range(options.look)]
    began = saved = time.monotonic()
    log = (run / "log.jsonl").open("a", encoding="utf-8")
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    step = first
    with bar, log:
        task = bar.add_task("training", total=total, completed=first)
        for step, batch in steps_from(first, options, device):
            if step == options.steps:
                torch.manual_seed(options.seed)
                learner.start_reading(every_feature(learner, options.seed, device))
                optimizers[:] = make_optimizers(learner, options.learning_rate)
            number, within = round_of(step, rounds)
            rate = options.learning_rate * schedule(within, rounds[number]) * (LATE_RATE if number > 2 else 1)
            for group in (group for each in optimizers for group in each.param_groups):
                group["lr"] = rate
            through = number + within / rounds[number]
            losses = one_step(learner, optimizers, batch, through, options.seed + step, device)
            done = step + 1
            line: dict[str, Any] = {"step": done, "seconds": round(time.monotonic() - began, 1)} | losses
            if done % LOOK_EVERY == 0 or done == total:
                line["held out"] = look(learner, held_out, device)
                bar.console.print(f"{done}: {_shown(line['held out'])}")
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update(task, completed=done, description=f"loss {losses['all']:.3f}")
            now = time.monotonic()
            over = options.minutes and now - began > options.minutes * 60
            if over or done == total or now - saved > SAVE_EVERY_S:
                keep(run, learner, optimizers, done)
                saved = now
            if over:
                break


def steps_from(first: int, options: argparse.Namespace, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Number and batch of each step from `first` on: those of the tower, then those of the language model."""
    begin = 0
    for number, steps in enumerate((options.steps, *options.language_steps)):
        numbers = range(max(first, begin), begin + steps)
        questions = options.questions if number == 0 else MORE_QUESTIONS * options.questions
        loader = DataLoader(
            Batches(options.seed, options.batch, questions, TYPES if number < 2 else HARD_TYPES),
            batch_size=None,
            sampler=_Numbers(numbers),
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        yield from zip(numbers, loader, strict=True)
        begin += steps


def round_of(step: int, rounds: Sequence[int]) -> tuple[int, int]:
    """Which round a step falls in, from 0, the tower's, and which step of that round it is."""
    number = 0
    while step >= rounds[number]:
        step -= rounds[number]
        number += 1
    return number, step


def one_step(
    learner: Learner,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    through: float,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """One step. Losses by name, the weighted sum as `all`.

    `through` is how many rounds are done: below 1 the tower learns, from then on it stays as it is and the
    language model learns alone.
    """
    learner.train()
    draw = torch.Generator().manual_seed(seed)
    thinning = draw_thinning(through, draw)
    kept = things_whole(batch.owners, thinning.seen, draw)
    read = thinned(batch.owners.gather(1, kept), thinning.read, draw)
    owners = batch.owners.gather(1, kept).gather(1, read).to(device)
    kept, read, batch = kept.to(device), read.to(device), batch.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.set_grad_enabled(through < 1):
            features, picture = learner.see(batch, kept)
        losses = learner.vision_losses(batch, kept, features, picture) if through < 1 else {}
        if through >= TOWER_ALONE:
            reading = learner.read(batch, features, read)
            losses["answer"] = nn.functional.cross_entropy(reading.logits.float(), reading.labels)
        if through >= 1:
            losses |= learner.lessons(batch, owners, reading)
    total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
    total.backward()
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    for each in optimizers:
        each.step()
        each.zero_grad(set_to_none=True)
    return {name: round(float(loss.detach()), 4) for name, loss in losses.items()} | {
        "all": round(float(total.detach()), 4)
    }


WEIGHTS: Final = {
    "kind": 0.5,
    "colour": 0.3,
    "size": 0.3,
    "middle": 3.0,
    "place": 2.0,
    "mask": 1.0,
    "dense": 0.3,
    "dense colour": 0.15,
    "dense kind": 0.15,
    "found": 0.15,
    "contrast": 0.1,
    "answer": 1.0,
    "marked": 0.3,
    "named middle": 3.0,
    "named kind": 0.5,
    "named colour": 0.2,
    "named size": 0.2,
    "number": 1.0,
    "apart": 3.0,
}


def draw_thinning(through: float, draw: torch.Generator) -> Thinning:
    """How many tokens the step works with that comes after so many rounds."""
    one, other, third = torch.rand(3, generator=draw).tolist()
    if through >= 1:
        # the fewer tokens, the faster: most of what is to be learned is learned from few
        late = through >= 1 + FEW_READ
        return Thinning(1.0, 1.0 if late and third < 0.3 else 0.06 + (0.6 if late else 0.3) * other * other)
    seen = 1.0 if through >= ALL_SEEN else 0.25 + 0.2 * one
    return Thinning(seen, 1.0 if third < 0.25 else 0.08 + 0.92 * other * other)


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate in a round's step: up in WARM_UP steps, level, down over the last 40 %."""
    up = min(1.0, (step + 1) / WARM_UP)
    left = (steps - step) / steps
    return up * min(1.0, 0.5 * (1 - math.cos(math.pi * min(1.0, left / 0.4))))


@torch.no_grad()
def every_feature(learner: Learner, seed: int, device: torch.device) -> torch.Tensor:
    """Features (F, D) of every patch of some pictures, to measure how they spread."""
    made = []
    for number in range(4):
        batch = Batches(seed, 16, 1)[number].to(device)
        made.append(learner.see(batch, _every_patch(batch))[0].flatten(0, 1).float())
    return torch.cat(made)


@torch.no_grad()
def look(learner: Learner, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Share of held-out questions of each type that greedy decoding answers right, from all tokens."""
    learner.eval()
    right: dict[str, list[bool]] = {each: [] for each in TYPES}
    for batch in batches:
        here = batch.to(device)
        every = _every_patch(here)
        with torch.autocast(device.type, torch.bfloat16):
            features, _ = learner.see(here, every)
            reading = learner.read(here, features, every)
        hits = (reading.logits.argmax(-1) == reading.labels).cpu()
        asked = (batch.labels != IGNORED).nonzero()  # (A, 2): picture, place
        branches = batch.branches[asked[:, 0], asked[:, 1]]
        for picture, types in enumerate(batch.types):
            for branch, kind in enumerate(types, start=1):
                right[kind].append(bool(hits[(asked[:, 0] == picture) & (branches == branch)].all()))
    return {kind: round(sum(each) / max(1, len(each)), 4) for kind, each in right.items()}


def keep(run: Path, learner: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Writes all that a later sitting needs; a stop in between leaves the older state whole."""
    tensors = {f"model.{name}": value.contiguous().clone() for name, value in learner.state_dict().items()}
    for order, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{order}.{index}.{name}"] = torch.as_tensor(value).clone()
    fresh = run / f"state-{step}.safetensors"
    save_file(tensors, fresh)
    older = [path for path in run.glob("state-*.safetensors") if path != fresh]
    (run / "state.json.new").write_text(json.dumps({"step": step, "file": fresh.name}), "utf-8")
    (run / "state.json.new").replace(run / "state.json")
    for path in older:
        path.unlink()


def restore(run: Path, learner: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Takes up what `keep` wrote: the number of steps done."""
    found = json.loads((run / "state.json").read_text("utf-8"))
    tensors = load_file(run / found["file"])
    learner.load_state_dict(
        {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    )
    for order, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{order}."):
                _, _, index, name = key.split(".", 3)
                states.setdefault(int(index), {})[name] = value
        whole["state"] = states
        optimizer.load_state_dict(whole)
    return int(found["step"])


class _Numbers(Sampler[int]):
    """Batch numbers: a sitting begins where the last ended."""

    def __init__(self, numbers: range) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def _every_patch(batch: Batch) -> torch.Tensor:
    """Indices (B, N) that leave none out."""
    return torch.arange(batch.owners.shape[1], device=batch.owners.device).expand(len(batch.owners), -1)


def _shown(accuracies: dict[str, float]) -> str:
    return "  ".join(f"{kind} {100 * share:.1f}" for kind, share in accuracies.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="out/shapes", help="folder of the run; an older run there goes on")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=1500, help="in which the tower learns")
    parser.add_argument(
        "--language-steps",
        type=int,
        nargs="+",
        default=[1800, 2000, 2000, 1000],
        help="after them, of the language model alone: rounds, in each of which the rate rises and falls",
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--questions", type=int, default=14, help="questions a picture")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0, help="end this sitting after so long; 0: never")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 lets torch decide")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--look", type=int, default=3, help="held-out batches of 32 to look at")
    options = parser.parse_args()
    if not 0 <= options.seed < HELD_OUT:
        parser.error(f"--seed: got {options.seed}, expected 0 to {HELD_OUT - 1}: those above are held out")
    return options


if __name__ == "__main__":
    main()
