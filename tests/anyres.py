"""What parity tests of the families that tile share: pictures, the wire, the stock model as reference."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from hiprune.errors import from_rpc
from hiprune.v1 import encoder_service_pb2, llm_service_pb2_grpc
from hiprune.v1 import llm_service_pb2 as pb
from hiprune.v1.pruner_service_pb2 import PrunePolicy
from services.encoder.families import EncodedView
from services.llm.visual import VisualTokens, VisualView

ANSWER_TOKENS = 10
# models this small are slower on several threads
ONE_THREAD = {f"HIPRUNE_{service}_THREADS": "1" for service in ("ENCODER", "PRUNER", "LLM")}

WORDS = (
    "what is this ?",
    "how many red shapes are there ?",
    "is there a star above the blue ring ?",
    "describe the picture .",
    "which colour is the square ?",
)


@contextmanager
def one_thread() -> Iterator[None]:
    """The same for what runs in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse noise: coloured blocks that survive any resizing, so that tokens differ."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def user(*parts: str) -> dict[str, Any]:
    """A user's turn for the stock processor: "" is a picture."""
    content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
    return {"role": "user", "content": content}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": words}]}


def request(
    turns: Sequence[dict[str, Any]], pictures: Sequence[Image.Image], policy: PrunePolicy
) -> pb.AskImageRequest:
    """The same conversation on the wire."""
    waiting = iter(pictures)
    messages = []
    for turn in turns:
        message = pb.Message(role=pb.Role.Value(f"ROLE_{turn['role'].upper()}"))
        for content in turn["content"]:
            part = message.parts.add()
            if content["type"] == "text":
                part.text = content["text"]
            else:
                part.media.image = encoded(next(waiting))
        messages.append(message)
    return pb.AskImageRequest(
        messages=messages, policy=policy, sampling=pb.Sampling(max_tokens=ANSWER_TOKENS)
    )


def visual_tokens(view: EncodedView) -> VisualTokens:
    """A base view alone, all of it kept."""
    kept = torch.arange(len(view.features))
    views = (VisualView(view.features, kept, view.grid),)
    return VisualTokens(views, encoder_service_pb2.MediaLayout(), "media")


@dataclass(frozen=True)
class Asked:
    report: pb.PruningReport
    completion: pb.Completion

    @property
    def tokens(self) -> list[int]:
        return list(self.completion.token_ids)

    def kept(self) -> list[list[list[int]]]:
        """Kept indices of each view of each picture."""
        return [[list(view.kept_indices) for view in media.views] for media in self.report.media]


async def ask(channel: Any, asked: pb.AskImageRequest) -> Asked:
    """The answer to a request. Raises HipruneError."""
    import grpc

    report, completion = pb.PruningReport(), pb.Completion()
    try:
        async for event in llm_service_pb2_grpc.ImageQaServiceStub(channel).AskImage(asked, timeout=120):
            match event.WhichOneof("event"):
                case "report":
                    report = event.report
                case "completion":
                    completion = event.completion
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, peer="llm") from error
    return Asked(report, completion)


@dataclass(frozen=True)
class Stock:
    """The stock model, eager so that it hands its attention out, and the stock processor on PIL."""

    model: Any
    processor: Any
    leading: int
    """Tokens before the grid: 1 for a CLS."""
    feature: int
    """Which of the tower's hidden states is the feature."""

    def answer(self, turns: Sequence[dict[str, Any]], pictures: Sequence[Image.Image]) -> list[int]:
        """Greedy tokens of stock `generate`."""
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(images=list(pictures) or None, text=text, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """(V, 3, h, w)."""
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def encoded(self, image: Image.Image) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features (V, N, D) before the projector, and each layer's scores (V, N) by their definition."""
        output = self.model.model.vision_tower(
            self.pixels(image), output_hidden_states=True, output_attentions=True
        )
        scores = [
            attention.sum(dim=2).mean(dim=1)[:, self.leading :] for attention in output.attentions
        ]  # (V, heads, queries, keys) each
        return output.hidden_states[self.feature][:, self.leading :], scores

    @torch.no_grad()
    def from_cls(self, image: Image.Image) -> list[torch.Tensor]:
        """Each layer's attention from CLS (V, N), averaged over heads."""
        output = self.model.model.vision_tower(self.pixels(image), output_attentions=True)
        return [attention[:, :, 0].mean(dim=1)[:, self.leading :] for attention in output.attentions]

    @torch.no_grad()
    def spliced_answer(
        self, turns: Sequence[dict[str, Any]], pieces: Sequence[Sequence[torch.Tensor]]
    ) -> list[int]:
        """Greedy tokens of the stock language model, the rows of `pieces` where each image token stands."""
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        ids = self.processor.tokenizer(text)["input_ids"]
        table = self.model.get_input_embeddings().weight
        waiting = iter(pieces)
        rows: list[torch.Tensor] = []
        for token in ids:
            rows += next(waiting) if token == self.model.config.image_token_id else [table[token]]
        prompt = torch.stack(rows)[None]
        output = self.model.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
        )
        return output[0].tolist()

    @torch.no_grad()
    def kept_rows(self, image: Image.Image, kept: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Each kept token's projected row: base view first, tiles in raster order, no newlines."""
        features, _ = self.encoded(image)
        projected = self.model.model.multi_modal_projector(features)
        return [projected[view, index] for view, indices in enumerate(kept) for index in indices]

    @torch.no_grad()
    def kept_rows_with_newlines(
        self, image: Image.Image, kept: Sequence[Sequence[int]], columns: int, side: int
    ) -> list[torch.Tensor]:
        """The base view's rows, then the tiles' row by row over all tiles, and a newline behind each row."""
        features, _ = self.encoded(image)
        projected = self.model.model.multi_modal_projector(features)
        rows = [projected[0, index] for index in kept[0]]
        for y in range((len(kept) - 1) // columns * side):
            found = []
            for x in range(columns * side):
                view, index = 1 + y // side * columns + x // side, y % side * side + x % side
                if index in kept[view]:
                    found.append(projected[view, index])
            rows += [*found, self.model.model.image_newline] if found else []
        return rows

    def all_padding(self, image: Image.Image, patch: int) -> list[set[int]]:
        """For each view, the tokens whose pixels are all padding, found by preparing a white picture."""
        white = self.pixels(Image.new("RGB", image.size, "white"))  # (V, 3, h, w)
        shows = torch.nn.functional.max_pool2d((white > 0).float().amax(dim=1), patch)  # (V, H, W)
        return [set((view.flatten() == 0).nonzero().flatten().tolist()) for view in shows]
