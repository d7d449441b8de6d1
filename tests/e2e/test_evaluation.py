"""The evaluation against the running service: what it says is what the service would have said."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hiprune import layer_choice
from hiprune.checkpoints import open_checkpoint
from hiprune.cli import app
from hiprune.config import EMBEDDED_MODEL
from hiprune.v1 import llm_service_pb2, pruner_service_pb2
from models.shapes.evaluate import Examiner, Plan, shared_out
from models.shapes.exam import sheet, token_owners
from models.shapes.prunings import Prunings, Services, services
from models.shapes.reader import LONGEST, Look, Reader
from models.shapes.summary import ablated, accuracy
from models.shapes.variants import ablations, kept, methods
from tests.stacks import SAMPLES

SHEETS = 2
BUDGETS = {"all", "1/3", "1/18"}


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(str(EMBEDDED_MODEL))


@pytest.fixture(scope="module")
def reader(checkpoint):
    return Reader(checkpoint)


@pytest.fixture
def one_thread():
    """What the evaluation's own processes compute with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prunings(stack, checkpoint) -> Prunings:
    return Prunings(Services(stack.encoder_address, stack.pruner_address), checkpoint.facts.deep_layer)


async def test_many_questions_at_a_time_are_answered_as_the_service_answers_each(
    stack, client, checkpoint, reader, one_thread
):
    """Kept indices and answers, token for token, under every method of the service."""
    asking = prunings(stack, checkpoint)
    sampling = llm_service_pb2.Sampling(max_tokens=LONGEST)
    compared = set()
    for number in range(SHEETS):
        asked = sheet(0, number, 1)
        questions = [question.text for question in asked.questions]
        encoded = await asking.encoded(asked.image)
        for variant in methods():
            if variant.budget not in BUDGETS or variant.draw:
                continue
            left = await kept(variant, asking, asked.image, encoded, questions)
            looks = [
                Look(each.features, each.indices, encoded.grid, (question,))
                for each, question in zip(left, questions, strict=True)
            ]
            if len({each.identity for each in left}) == 1:
                looks = [Look(left[0].features, left[0].indices, encoded.grid, tuple(questions))]
            answers = [answer for row in reader.answer(looks) for answer in row]
            for question, each, answer in zip(questions, left, answers, strict=True):
                served = await client.ask(question, asked.image, policy=variant.proto(), sampling=sampling)
                (view,) = served.report.media[0].views
                assert list(view.kept_indices) == each.indices.tolist(), (variant, question)
                assert list(served.completion.token_ids) == list(answer.tokens), (variant, question)
                assert served.text.strip() == answer.text
                compared.add((variant.name, answer.text))
    assert len({name for name, _ in compared}) >= 5
    assert len({text for _, text in compared}) >= 8  # and they are not all the same answer


async def test_the_ablations_defaults_are_what_the_service_keeps_by_itself(stack, checkpoint):
    asking = prunings(stack, checkpoint)
    asked = sheet(0, 0, 1)
    encoded = await asking.encoded(asked.image)
    compared = 0
    for variant in ablations(checkpoint.facts):
        if variant.served and not variant.group.endswith("alpha 1"):
            method = pruner_service_pb2.METHOD_HIPRUNE
            if variant.group == "beta":
                method = pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS
            policy = variant.proto()
            default = pruner_service_pb2.PrunePolicy(method=method, keep_ratio=policy.keep_ratio)
            question = asked.questions[0].text
            (left,) = await kept(variant, asking, asked.image, encoded, [question])
            served = await asking.pruned(asked.image, default, question)
            assert left.indices.tolist() == served.indices.tolist(), variant
            torch.testing.assert_close(left.features, served.features, rtol=0, atol=0)
            compared += 1
    assert compared >= 10


async def test_the_same_plan_gives_the_same_answers_however_many_processes_share_it(one_thread):
    plan = Plan(str(EMBEDDED_MODEL), scenes=2, ablation_scenes=1, each=1)
    with services(plan.model) as running:
        shared = await asyncio.to_thread(shared_out, plan, running, 2)
        alone = Examiner(plan, running)
        again = [await alone.examine(number) for number in range(plan.scenes)]
    assert [record.found for record in shared] == [record.found for record in again]
    variants = plan.variants()
    assert len(shared[0].found) == len(variants) > len(shared[1].found) == len(methods())
    assert accuracy(shared, variants, 0) == accuracy(again, variants, 0)
    assert ablated(shared, variants, 0)["scenes"] == 1


async def test_the_layer_that_is_suggested_meets_objects_nearly_as_well_as_the_best_does(stack, checkpoint):
    asking = prunings(stack, checkpoint)
    views, met = [], []
    for number in range(24):
        asked = sheet(1, number, 1)
        encoded = await asking.encoded(asked.image)
        views.append(layer_choice.View(encoded.scores, encoded.grid))
        thing = token_owners(asked.owners, encoded.grid) > 0
        tops = {layer: layer_choice.top_tokens(scores) for layer, scores in encoded.scores.items()}
        met.append({layer: (top & thing).sum() / (top | thing).sum() for layer, top in tops.items()})
    deep = checkpoint.facts.deep_layer
    iou = {layer: np.mean([each[layer] for each in met]) for layer in range(1, deep)}
    suggested = layer_choice.suggest(layer_choice.profiles(views), deep)
    assert iou[suggested] >= 0.9 * max(iou.values()), iou
    assert sum(each >= 0.9 * iou[suggested] for each in iou.values()) <= 4, iou  # not any will do


def test_the_command_suggests_a_layer_from_a_folder_of_pictures(checkpoint):
    result = CliRunner().invoke(
        app, ["suggest-layer", str(SAMPLES), "--model", str(EMBEDDED_MODEL), "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    merits = {each["layer"]: each["merit"] for each in found["layers"]}
    assert sorted(merits) == list(range(1, checkpoint.facts.deep_layer + 1))
    assert found["object_layer"] == max(range(1, found["deep_layer"]), key=lambda layer: merits[layer])
    assert found["default_object_layer"] == checkpoint.facts.object_layer
    assert found["images"] == len(list(SAMPLES.glob("*.png")))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["suggest-layer", "nowhere.png", "--model", str(EMBEDDED_MODEL)], "nowhere.png"),
        (["suggest-layer", str(SAMPLES / "scene00.png"), "--model", str(EMBEDDED_MODEL)], "at least 2"),
        (["suggest-layer", str(SAMPLES), "--model", "no-such-model"], "no-such-model"),
        (["evaluate", "--model", "no-such-model"], "no-such-model"),
        (["evaluate", "--scenes", "1"], "scenes"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, said):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in {1, 2}
    assert said in result.output
