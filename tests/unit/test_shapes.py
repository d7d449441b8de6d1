"""The included model's scenes and questions: what is said of a picture is what is in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.shapes import architecture, scenes
from models.shapes.batches import IGNORED, make
from models.shapes.learner import things_whole, thinned, unlikely_once
from models.shapes.questions import SEVERAL, TYPES, Phrase, phrases, place, questions
from models.shapes.scenes import COLOURS, GRID, SIDE, Scene, Thing, render, scene
from models.shapes.train import WARM_UP, make_learner, round_of, schedule

MANY = [scene(7, number) for number in range(60)]


def asked(types: set[str]):
    for number, each in enumerate(MANY):
        for question in questions(each, 21, np.random.default_rng(number)):
            if question.type in types:
                yield each, question


def test_a_scene_and_its_picture_follow_from_the_seed():
    assert scene(7, 3) == MANY[3] != MANY[4]
    assert (render(scene(7, 3))[0] == render(MANY[3])[0]).all()


def test_every_thing_is_where_the_scene_says_in_the_colour_it_says():
    for each in MANY[:30]:
        picture, owners = render(each)
        for order, thing in enumerate(each.things, start=1):
            rows, columns = np.nonzero(owners == order)
            assert np.hypot(rows.mean() - thing.y, columns.mean() - thing.x) < 0.2 * thing.radius + 1
            assert np.hypot(rows - thing.y, columns - thing.x).max() < 1.05 * thing.radius + 2
            shown = np.median(picture[owners == order].astype(float), axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(shown - COLOURS[name]).sum())
            assert nearest == thing.colour


def test_things_do_not_touch():
    for each in MANY:
        for one in each.things:
            for other in each.things:
                if one is not other:
                    assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_colour_and_shape_are_asked_of_what_is_there_once():
    seen = 0
    for each, question in asked({"colour", "shape"}):
        (about,) = question.about
        thing = each.things[about]
        given, answer = ("kind", "colour") if question.type == "colour" else ("colour", "kind")
        assert getattr(thing, given) in question.text.split()
        assert question.answer == getattr(thing, answer)
        assert sum(getattr(other, given) == getattr(thing, given) for other in each.things) == 1
        seen += 1
    assert seen > 50


def test_counts_are_counted():
    for each, question in asked({"count"}):
        words = question.text.replace("crosses", "cross").split()
        wanted = [
            thing
            for thing in each.things
            if ("shapes" in words and not set(words) & set(COLOURS))
            or thing.colour in words
            or f"{thing.kind}s" in words
            or thing.kind in words
        ]
        assert question.answer == str(len(wanted)) == str(len(question.about))


def test_training_asks_for_counts_of_some_things_and_is_told_which():
    answers = []
    for number, each in enumerate(MANY):
        for question in questions(each, 3, np.random.default_rng(number), (SEVERAL,)):
            assert question.type == "count"
            (phrase,) = phrases(each, question.text)
            assert phrase.fits == question.about
            assert question.answer == str(len(question.about))
            answers.append(len(question.about))
            assert 1 < len(question.about) < len(each.things)
    assert set(answers) >= {2, 3}


def test_exist_says_yes_of_what_is_there_alone_and_as_often_as_no():
    answers = []
    for each, question in asked({"exist"}):
        there = any(
            thing.colour in question.text.split() and thing.kind in question.text.split()
            for thing in each.things
        )
        assert question.answer == ("yes" if there else "no")
        answers.append(question.answer)
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_relations_hold_by_far():
    seen = 0
    for each, question in asked({"relation"}):
        one, other = (each.things[order] for order in question.about)
        horizontal = "left" in question.text or "right" in question.text
        distance = one.x - other.x if horizontal else one.y - other.y
        assert abs(distance) >= 28
        words = ("left", "right") if horizontal else ("above", "below")
        true = words[distance > 0]
        if question.answer in ("yes", "no"):
            assert question.answer == ("yes" if true in question.text.split() else "no")
        else:
            assert question.answer == true
        seen += 1
    assert seen > 30


def test_places_are_clear_of_their_borders():
    for each, question in asked({"where"}):
        thing = each.things[question.about[0]]
        assert question.answer == place(thing)
        assert all(abs(at - edge) >= 7 for at in (thing.x, thing.y) for edge in (SIDE / 3, 2 * SIDE / 3))


def test_the_tokenizer_knows_every_word_of_every_question_and_answer():
    words = architecture.tokenizer()
    for _, question in asked(set(TYPES)):
        assert architecture.UNKNOWN not in words(f"{question.text} {question.answer}")["input_ids"]


def test_a_batch_labels_the_answer_that_follows():
    words = architecture.tokenizer()
    batch = make(words, 7, 0, 4, 7)
    assert batch.pixels.shape == (4, 3, SIDE, SIDE)
    assert batch.owners.shape == (4, GRID * GRID)
    for picture in range(4):
        asked_here = questions(MANY[picture], 7, np.random.default_rng([7, picture, 2]))
        assert batch.types[picture] == [each.type for each in asked_here]
        for branch, each in enumerate(asked_here, start=1):
            mine = batch.branches[picture] == branch
            labels = batch.labels[picture][mine]
            # what is to be said at a token is the token behind it
            assert (labels[:-1] == batch.ids[picture][mine][1:])[labels[:-1] != IGNORED].all()
            assert words.decode(labels[labels != IGNORED]) == f"{each.answer} </s>"


def test_thinning_keeps_a_share_in_order_with_a_token_of_each_thing_and_its_taste_for_things_varies():
    owners = torch.from_numpy(np.stack([scenes.patch_owners(render(each)[1]).ravel() for each in MANY[:40]]))
    kept = thinned(owners, 0.25, torch.Generator().manual_seed(0))
    assert kept.shape == (40, 144)
    assert (kept.diff(dim=1) > 0).all()
    share = (owners.gather(1, kept) > 0).float().mean(1) / (owners > 0).float().mean(1)
    assert share.min() < 0.5
    assert share.max() > 2
    fewest = owners.gather(1, thinned(owners, 0.02, torch.Generator().manual_seed(0)))
    for there, read in zip(owners, fewest, strict=True):
        assert set(read.tolist()) - {0} == set(there.tolist()) - {0}


def test_what_the_tower_sees_in_training_leaves_no_patch_of_a_thing_out():
    owners = torch.from_numpy(np.stack([scenes.patch_owners(render(each)[1]).ravel() for each in MANY[:20]]))
    kept = things_whole(owners, 0.6, torch.Generator().manual_seed(0))
    assert kept.shape == (20, round(0.6 * GRID * GRID))
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal((owners.gather(1, kept) > 0).sum(1), (owners > 0).sum(1))


def test_the_mask_of_a_patch_is_where_its_owner_is():
    batch = make(architecture.tokenizer(), 7, 0, 2, 3)
    for number in range(2):
        pixels = scenes.patches(render(MANY[number])[1])
        for patch, owner in enumerate(batch.owners[number].tolist()):
            assert batch.masks[number, patch].tolist() == (pixels[patch] == owner).tolist()


def test_a_phrase_fits_what_it_describes():
    things = tuple(
        Thing(kind, colour, size, 0, 0, 1, 0)
        for kind, colour, size in (
            ("star", "red", "small"),
            ("star", "red", "large"),
            ("cross", "red", "large"),
            ("cross", "blue", "large"),
        )
    )
    for text, expected in {
        "is the small red star left of the large cross ?": [Phrase(4, (0,)), Phrase(9, (2, 3))],
        "how many crosses are there ?": [Phrase(2, (2, 3))],
        "how many red shapes are there ?": [Phrase(3, (0, 1, 2))],
        "count the shapes .": [Phrase(2, (0, 1, 2, 3))],
        "is there a blue star ?": [Phrase(4, ())],
        "is the blue cross large or small ?": [Phrase(3, (3,))],
        "what is the blue shape ?": [Phrase(4, (3,))],
        "which shape is blue ?": [Phrase(1, (0, 1, 2, 3)), Phrase(3, (3,))],
        "what shape is small red ?": [Phrase(1, (0, 1, 2, 3)), Phrase(4, (0,))],
        "yes": [],
    }.items():
        assert phrases(Scene(things, (0,)), text) == expected, text


def test_every_question_has_a_phrase_and_what_it_is_about_fits():
    for each, question in asked(set(TYPES)):
        found = phrases(each, question.text)
        assert found, question
        fits = {thing for phrase in found for thing in phrase.fits}
        if question.type in ("shape", "exist"):  # "which shape is red ?", two red stars
            assert fits >= set(question.about) or question.answer == "no", question
        else:
            assert fits == set(question.about), question


def test_a_batch_says_where_its_phrases_end_and_what_they_fit():
    words = architecture.tokenizer()
    batch = make(words, 7, 0, 4, 14)
    for picture in range(4):
        expected = [
            (question.text.split()[phrase.end], {thing + 1 for thing in phrase.fits})
            for question in questions(MANY[picture], 14, np.random.default_rng([7, picture, 2]))
            for phrase in phrases(MANY[picture], question.text)
        ]
        ends = batch.phrase_ends[picture]
        assert (ends[len(expected) :] == -1).all()
        found = [
            (words.decode(batch.ids[picture, end]), set(fits.nonzero()[:, 0].tolist()))
            for end, fits in zip(ends, batch.phrase_fits[picture], strict=True)
            if end >= 0
        ]
        assert found == expected


def test_a_phrase_is_compared_with_the_one_before_it_in_a_question_of_relations_alone():
    words = architecture.tokenizer()
    batch = make(words, 7, 0, 4, 14)
    compared = 0
    for picture in range(4):
        order = 0
        for question in questions(MANY[picture], 14, np.random.default_rng([7, picture, 2])):
            found = phrases(MANY[picture], question.text)
            befores = batch.phrase_befores[picture, order : order + len(found)].tolist()
            assert befores == ([-1, order] if question.type == "relation" else [-1] * len(found)), question
            compared += question.type == "relation"
            order += len(found)
        assert (batch.phrase_befores[picture, order:] == -1).all()
    assert compared


def test_rounds_follow_each_other_and_each_has_its_own_rise_and_fall():
    rounds = (300, 0, 200)
    assert [round_of(step, rounds) for step in (0, 299, 300, 499)] == [(0, 0), (0, 299), (2, 0), (2, 199)]
    rates = [schedule(step, 300) for step in range(300)]
    assert rates[0] == pytest.approx(1 / WARM_UP)
    assert max(rates) == 1 == rates[WARM_UP] == rates[179]
    assert rates[-1] < 1e-3
    assert rates[179:] == sorted(rates[179:], reverse=True)


def test_of_each_thing_any_one_token_may_be_marked_and_of_the_background_none():
    owners = torch.tensor([[0, 2, 2, 1, 0, 1, 2], [0, 0, 3, 3, 3, 3, 4]])

    def unlikely(*marked: list[int]) -> float:
        marks = torch.full(owners.shape, -20.0)
        for row, places in zip(marks, marked, strict=True):
            row[places] = 20.0
        return float(unlikely_once(marks, owners))

    for right in ([1, 3], [2, 3], [6, 5]):
        assert unlikely(right, [4, 6]) < 1e-6
    # four things, and one logarithm of e^-20 for each mistake
    for wrong in ([[1, 2, 3], [4, 6]], [[1], [4, 6]], [[0, 1, 3], [4, 6]]):
        assert unlikely(*wrong) == pytest.approx(20 / 4, rel=0.1), wrong
    # by hand: one of two tokens marked, each with chance 1/2, and one of the background
    even = unlikely_once(torch.zeros(1, 3), torch.tensor([[0, 1, 1]]))
    assert float(even) == pytest.approx(-np.log(0.5) - np.log(0.5))


def test_the_projector_begins_with_even_features_and_takes_them_as_they_are_once_folded():
    torch.manual_seed(0)
    learner = make_learner().eval()
    width = learner.centre.shape[0]
    features = torch.randn(4000, width) * torch.logspace(-1, 2, width) + 10 * torch.randn(width)
    learner.start_reading(features)
    even = (features - learner.centre) @ learner.whitener
    torch.testing.assert_close(torch.cov(even.T), torch.eye(width), rtol=0, atol=0.02)
    batch = make(architecture.tokenizer(), 7, 0, 2, 7)
    some = features[: 2 * 30].reshape(2, 30, width)
    every = torch.arange(30).expand(2, -1)
    with torch.inference_mode():
        before = learner.read(batch, some, every).logits
        projector = learner.llava.model.multi_modal_projector
        projected = projector((some - learner.centre) @ learner.whitener)
        learner.fold()
        after = learner.read(batch, some, every).logits
        torch.testing.assert_close(projector(some), projected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before[0], before[-1])
