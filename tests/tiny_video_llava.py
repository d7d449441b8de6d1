"""A complete Video-LLaVA of random weights (towers, projector, Llama, tokenizer, template), and stock.

The tokenizer is the embedded model's with a `<video>` token behind its last word; the chat template puts
images first, then videos, then words, as the released model's does. See `tests.tiny`.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)

from hiprune.config import EMBEDDED_MODEL
from hiprune.v1 import llm_service_pb2
from tests.tiny import WORDS, Layout

IMAGE_TOKEN, VIDEO_TOKEN = 4, WORDS
VOCABULARY = WORDS + 1
PATCHES = 16  # of a view, beside its CLS
ANSWER_TOKENS = 12
# which frames stand for a video of so many, written out
SAMPLED = {
    1: [0] * 8,
    3: [0, 0, 0, 1, 1, 1, 2, 2],
    8: [0, 1, 2, 3, 4, 5, 6, 7],
    9: [0, 1, 2, 3, 4, 5, 6, 7],
    20: [0, 2, 5, 7, 10, 12, 15, 17],
}

# `image_tower.encoder.…`, `image_tower.vision_model.encoder.…` (the released model's) and
# `model.image_tower.encoder.…` (transformers' own)
_RENAMES: Final[dict[Layout, tuple[tuple[str, str], ...]]] = {
    "flat": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ),
    "vision_model": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(image|video)_tower\.", r"\1_tower.vision_model."),
        (r"^model\.", ""),
    ),
    "model": (),
}

_TEMPLATE: Final = """\
{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}\
{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}\
{% for c in m['content'] if c['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}\
{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ ' ' }}\
{% else %}{{ 'ASSISTANT: ' }}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ '</s>' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def make_video_llava(
    path: Path,
    seed: int = 0,
    *,
    layout: Layout = "vision_model",
    image_size: int = 32,
    patch_size: int = 8,
    vision_layers: int = 8,
    vision_hidden: int = 48,
    text_layers: int = 3,
    text_hidden: int = 64,
    context: int = 1024,
) -> Path:
    """Writes the directory and returns it. Same arguments, same bytes; torch's global generator is not used.

    Views of (image_size / patch_size)² tokens and a CLS.
    """
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=text_hidden,
            intermediate_size=2 * text_hidden,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=context,
            bos_token_id=1,
            eos_token_id=3,
            pad_token_id=0,
        ),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_seq_length=(image_size // patch_size) ** 2,
        video_seq_length=8 * ((image_size // patch_size) ** 2 + 1),
    )
    config.architectures = ["VideoLlavaForConditionalGeneration"]
    config.dtype = torch.float32
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = VideoLlavaForConditionalGeneration(config).state_dict()
    _save_weights(path, {name: tuple(each.shape) for name, each in shapes.items()}, seed, layout)
    _save_text_files(path)
    _save_processors(path, image_size, patch_size)
    return path


def _save_weights(path: Path, shapes: dict[str, tuple[int, ...]], seed: int, layout: Layout) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if len(shape) == 1:  # norms, biases and the CLS
            base = 1.0 if re.search(r"norm\w*\.weight$", name) else 0.0
            tensor = base + 0.05 * torch.randn(shape, generator=generator)
        elif "embed" in name and "patch" not in name:
            tensor = 0.3 * torch.randn(shape, generator=generator)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            tensor = 1.5 * torch.randn(shape, generator=generator) / fan_in**0.5
        key = name
        for pattern, replacement in _RENAMES[layout]:
            key = re.sub(pattern, replacement, key)
        stored[key] = tensor.contiguous()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})


def _save_text_files(path: Path) -> None:
    tokenizer = json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text("utf-8"))
    image = next(token for token in tokenizer["added_tokens"] if token["content"] == "<image>")
    tokenizer["added_tokens"].append({**image, "id": VIDEO_TOKEN, "content": "<video>"})
    tokenizer["model"]["vocab"]["<video>"] = VIDEO_TOKEN
    settings = json.loads((EMBEDDED_MODEL / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"processor_class": "VideoLlavaProcessor", "video_token": "<video>"}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": _TEMPLATE}), "utf-8")


def _save_processors(path: Path, image_size: int, patch_size: int) -> None:
    image_processor = {
        "image_processor_type": "VideoLlavaImageProcessor",
        "processor_class": "VideoLlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processor = {
        "processor_class": "VideoLlavaProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "patch_size": patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    generation = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    for name, content in (
        ("preprocessor_config.json", image_processor),
        ("processor_config.json", processor),
        ("generation_config.json", generation),
    ):
        (path / name).write_text(json.dumps(content, indent=2), "utf-8")


class Stock:
    """The stock model on the same pixels, for the defaults of `make_video_llava`: the reference of its tests.

    Its video processor wants torchvision, so it gets tensors; placeholders are expanded and rows
    spliced here.
    """

    def __init__(self, path: Path) -> None:
        self.model = VideoLlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = VideoLlavaImageProcessor.from_pretrained(path)
        self.template = json.loads((path / "chat_template.json").read_text("utf-8"))["chat_template"]
        self.answers: dict[bytes, list[int]] = {}

    def pixels(self, images: list[bytes]) -> torch.Tensor:
        """(F, 3, h, w)"""
        opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        return self.processor(opened, return_tensors="pt")["pixel_values_images"]

    def frames(self, clip) -> torch.Tensor:
        """(8, 3, h, w): the sampled frames."""
        return self.pixels([clip.frames[number] for number in SAMPLED[len(clip.frames)]])

    def prompt(self, messages) -> list[int]:
        """Token ids with one placeholder a media item."""
        turns = []
        for message in messages:
            content = []
            for part in message.parts:
                if part.HasField("text"):
                    content.append({"type": "text", "text": part.text})
                else:
                    content.append({"type": part.media.WhichOneof("content")})
            is_user = message.role == llm_service_pb2.ROLE_USER
            turns.append({"role": "user" if is_user else "assistant", "content": content})
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text)["input_ids"]

    def answer(self, messages) -> list[int]:
        """Of a conversation with nothing pruned; computed once."""
        key = b"".join(message.SerializeToString(deterministic=True) for message in messages)
        if key not in self.answers:
            self.answers[key] = self._answer(messages)
        return self.answers[key]

    def _answer(self, messages) -> list[int]:
        lengths = {IMAGE_TOKEN: PATCHES, VIDEO_TOKEN: 8 * (PATCHES + 1)}
        ids = [token for token in self.prompt(messages) for _ in range(lengths.get(token, 1))]
        media = media_of(messages)
        images = [each.image for each in media if each.HasField("image")]
        videos = [self.frames(each.video) for each in media if each.HasField("video")]
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            **({"pixel_values_images": self.pixels(images)} if images else {}),
            **({"pixel_values_videos": torch.stack(videos)} if videos else {}),
        }
        output = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        return output[0, len(ids) :].tolist()

    @torch.no_grad()
    def tower(self, media):
        """Features (V, 17, D), CLS first, each layer's scores (V, 16), CLS queries counted, and its attention
        from CLS alone (V, 16)."""
        name, pixels = (
            ("image_tower", self.pixels([media.image]))
            if media.HasField("image")
            else ("video_tower", self.frames(media.video))
        )
        output = getattr(self.model.model, name)(pixels, output_hidden_states=True, output_attentions=True)
        scores = {
            layer: matrix.sum(dim=2).mean(dim=1)[:, 1:]
            for layer, matrix in enumerate(output.attentions, start=1)
        }
        from_cls = {
            layer: matrix[:, :, 0].mean(dim=1)[:, 1:]
            for layer, matrix in enumerate(output.attentions, start=1)
        }
        return output.hidden_states[-2], scores, from_cls

    @torch.no_grad()
    def pruned_answer(self, messages, report) -> list[int]:
        """From the kept rows, spliced into the embeddings: the stock language model on a shorter prompt."""
        embed, project = self.model.get_input_embeddings(), self.model.model.multi_modal_projector
        media = iter(zip(media_of(messages), report.media, strict=True))
        pieces = []
        for token in self.prompt(messages):
            if token not in (IMAGE_TOKEN, VIDEO_TOKEN):
                pieces.append(embed(torch.tensor([token])))
                continue
            item, kept = next(media)
            for rows, view in zip(project(self.tower(item)[0]), kept.views, strict=True):
                pieces += [rows[:1]] if token == VIDEO_TOKEN else []
                pieces.append(rows[[1 + index for index in view.kept_indices]])
        spliced = torch.cat(pieces)[None]
        output = self.model.generate(
            inputs_embeds=spliced,
            attention_mask=torch.ones(spliced.shape[:2], dtype=torch.long),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
        )
        return output[0].tolist()


def media_of(messages) -> list:
    return [part.media for message in messages for part in message.parts if part.HasField("media")]
