"""Training from nothing, on a schedule so short that it runs in CI, learns."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from models.shapes.batches import HELD_OUT, Batches
from models.shapes.learner import Learner
from models.shapes.train import TOWER_ALONE, make_learner, make_optimizers, restore, train

STEPS = 40
LANGUAGE_STEPS = [3, 1]
"""Two rounds."""
PICTURES = 6
LEARNING_RATE = 5e-3
"""Higher than training's own: a schedule of so few steps ends before its warm-up does."""


def seen(learner: Learner) -> dict[str, float]:
    """Of held-out patches that show a thing: colours told right, and how far off middles are, in widths."""
    batch = Batches(HELD_OUT, 12, 1)[0]
    every = torch.arange(batch.owners.shape[1]).expand(len(batch.owners), -1)
    with torch.inference_mode():
        features, _ = learner.eval().see(batch, every)
        normed = learner.norm(features)
        thing = batch.owners > 0
        colours = batch.colours.gather(1, batch.owners)
        middles = batch.middles.gather(1, batch.owners[..., None].expand(-1, -1, 2))
        told = learner.colour(normed).argmax(-1)
        off = (learner.middle(normed) - middles).norm(dim=-1)
    return {
        "colour": float((told == colours)[thing].float().mean()),
        "middle": float(off[thing].mean()),
        "commonest": float(colours[thing].bincount().max() / thing.sum()),
    }


@pytest.fixture
def one_thread():
    """Two are little faster, and many times slower where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.state_dict().items()}


@pytest.mark.extra
def test_a_shortened_schedule_learns_from_nothing_and_then_the_language_model_alone(tmp_path, one_thread):
    device = torch.device("cpu")
    options = argparse.Namespace(
        seed=1,
        batch=PICTURES,
        questions=5,
        steps=STEPS,
        language_steps=[],
        workers=0,
        look=0,
        learning_rate=LEARNING_RATE,
        minutes=0,
    )
    torch.manual_seed(options.seed)
    learner = make_learner()
    before = seen(learner)
    optimizers = make_optimizers(learner, options.learning_rate)
    train(learner, optimizers, options, tmp_path, 0, device)
    after = seen(learner)
    assert after["colour"] > 0.1 + max(before["colour"], before["commonest"]), (before, after)
    assert after["middle"] < 0.6 * before["middle"], (before, after)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # patches against words: from chance over ten colours to a small part of it
    words = [line["dense colour"] for line in lines]
    assert sum(words[-4:]) / 4 < 0.4 * words[0]
    answers = [line["answer"] for line in lines if "answer" in line]
    # the language model begins when the tower has something to tell; chance over its words is log(90) = 4.5
    assert len(answers) == sum(step / STEPS >= TOWER_ALONE for step in range(STEPS))
    assert sum(answers[-4:]) / 4 < 0.7 * answers[0]

    # the rounds of the language model: one step of them, then the end of the sitting
    tower = weights(learner)
    options.language_steps, options.minutes = LANGUAGE_STEPS, 1e-9
    train(learner, optimizers, options, tmp_path, STEPS, device)
    assert json.loads((tmp_path / "state.json").read_text("utf-8"))["step"] == STEPS + 1
    # another process goes on, as the one that did not stop
    options.minutes = 0
    other = make_learner()
    others = make_optimizers(other, options.learning_rate)
    assert restore(tmp_path, other, others) == STEPS + 1
    for each, some, run in ((learner, optimizers, tmp_path / "unbroken"), (other, others, tmp_path)):
        run.mkdir(exist_ok=True)
        train(each, some, options, run, STEPS + 1, device)
    torch.testing.assert_close(weights(other), weights(learner), rtol=0, atol=0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + sum(LANGUAGE_STEPS) + 1))
    alone = lines[STEPS:]
    lessons = {"marked", "named middle", "named kind", "named colour", "named size", "number", "apart"}
    assert all(set(line) - {"held out"} == {"step", "seconds", "answer", "all"} | lessons for line in alone)
    moved = {name for name, value in weights(other).items() if not torch.equal(value, tower[name])}
    assert moved
    assert all(
        name.startswith(
            (
                "llava.model.language_model.",
                "llava.model.multi_modal_projector.",
                "llava.lm_head.",
                *("centre", "whitener", "named.", "mark.", "number.", "apart."),
            )
        )
        for name in moved
    ), moved
    assert json.loads((tmp_path / "state.json").read_text("utf-8"))["step"] == STEPS + sum(LANGUAGE_STEPS)
