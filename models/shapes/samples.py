"""The sample pictures and questions: `python -m models.shapes.samples` draws and asks them anew.

Held-out scenes, each with one question of every type that it allows. The stock model's own answer to each,
greedy and from all tokens, is written beside the truth, so that whoever serves the model can hold an answer
against it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hiprune.config import EMBEDDED_MODEL
from models.shapes.batches import HELD_OUT
from models.shapes.questions import TYPES, Question, question
from models.shapes.scenes import Scene, render, scene

SEED: Final = HELD_OUT + 2
"""Apart from the scenes of `evaluate`, which are those of other held-out seeds."""
SCENES: Final = 16
OPENING: Final = "which colour is the circle ?"
"""The first question of the first scene: what README asks."""
_ANSWER_TOKENS: Final = 4


def main() -> None:
    """Writes `scene00.png`, … and `questions.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="directory of the model")
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL.parents[1] / "samples")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(options.model)
    written = []
    for order, (each, asked) in enumerate(chosen()):
        name = f"scene{order:02}.png"
        picture = Image.fromarray(render(each)[0])
        picture.save(options.out / name, optimize=True)
        for one in asked:
            answer = stock_answer(model, processor, picture, one.text)
            written.append(
                {
                    "image": name,
                    "type": one.type,
                    "question": one.text,
                    "truth": one.answer,
                    "unpruned_answer": answer,
                }
            )
    (options.out / "questions.json").write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    right = sum(each["truth"] == each["unpruned_answer"] for each in written)
    print(f"{options.out}: {SCENES} scenes, {len(written)} questions, {right} answered right by the model")


def chosen() -> Iterator[tuple[Scene, list[Question]]]:
    """The scenes that allow a question of every type, with one of each, in the order of TYPES."""
    found, number = 0, 0
    while found < SCENES:
        each = scene(SEED, number)
        draw = np.random.default_rng([*each.number, 3])
        asked = [made for type_ in TYPES if (made := question(each, type_, draw))]
        number += 1
        if len(asked) < len(TYPES) or (found == 0 and asked[0].text != OPENING):
            continue
        found += 1
        yield each, asked


@torch.no_grad()
def stock_answer(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, picture: Image.Image, text: str
) -> str:
    """What the model itself says, through transformers alone."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    words: str = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return words.strip()


if __name__ == "__main__":
    main()
