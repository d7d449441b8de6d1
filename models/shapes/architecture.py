"""The model's shape, its words, and how it lies on disk: LLaVA-1.5 over a CLIP tower, and that tower's CLIP.

Sizes are chosen so that the method meets its own numbers, 576 visual tokens and a deep layer before the last,
and that two CPU cores can train it in an hour or two. Heads are 64 wide, as the score kernels and vLLM take
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from models.shapes.questions import plural
from models.shapes.scenes import COLOURS, GRID, KINDS, PATCH, SIDE

WIDTH: Final = 128
LAYERS: Final = 12
OBJECT_LAYER: Final = 9
"""What `hiprune suggest-layer` proposes for the trained tower; written into its `config.json`."""
PROJECTION: Final = 128
LANGUAGE_WIDTH: Final = 192
LANGUAGE_LAYERS: Final = 4

PAD, BOS, UNKNOWN, EOS, IMAGE, USER, ASSISTANT = range(7)
"""Ids of the special tokens. The end is 3, since CLIP's text tower takes 2 for a mistake of old configs."""
_SPECIAL: Final = ("<pad>", "<s>", "<unk>", "</s>", "<image>", "USER:", "ASSISTANT:")
_PLAIN: Final = (
    "! , . 0 1 2 3 4 5 : ? a above an and another any are at background below between big bottom by can "
    "center centre color colour corner count describe different do does empty for four from has have hello "
    "hi how i image in is it large left little many me middle near next no none not nothing object objects "
    "of on one other photo picture please right same see shape shapes show side small tell that the there "
    "these this three to top two what where which with yes you 6 7 8 9 or size five six"
)
"""Words by themselves; those for colours and kinds come from `scenes`."""

MEAN: Final = (0.48, 0.48, 0.48)
STD: Final = (0.25, 0.25, 0.25)
CONTEXT: Final = 2048
TEXT_CONTEXT: Final = 77

CHAT: Final = (
    "{% for m in messages %}{% if m['role']=='user' %}{{ 'USER: ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type']=='image' %}{{ '<image>\n' }}"
    "{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type']=='text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% else %}{{ 'ASSISTANT: ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def words() -> list[str]:
    """Every token, by id."""
    shown = [*COLOURS, *KINDS, *(plural(kind) for kind in KINDS)]
    return list(dict.fromkeys([*_SPECIAL, *_PLAIN.split(" "), *shown]))


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, in lower case; what it does not know is `<unk>`."""
    made = Tokenizer(models.WordLevel({word: order for order, word in enumerate(words())}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    made.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in _SPECIAL])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=CONTEXT,
    )


def vision_config() -> CLIPVisionConfig:
    """12 layers of 128 channels over 24 × 24 patches."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=PROJECTION,
        hidden_act="gelu",
    )


def build() -> tuple[LlavaForConditionalGeneration, CLIPModel]:
    """Both, untrained, with one vision tower between them. torch's global seed decides the weights."""
    clip = CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(
                vocab_size=len(words()),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=4,
                num_attention_heads=WIDTH // 64,
                max_position_embeddings=TEXT_CONTEXT,
                projection_dim=PROJECTION,
                hidden_act="gelu",
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
            ).to_dict(),
            vision_config=vision_config().to_dict(),
            projection_dim=PROJECTION,
        )
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config().to_dict(),
            text_config=LlamaConfig(
                vocab_size=len(words()),
                hidden_size=LANGUAGE_WIDTH,
                intermediate_size=512,
                num_hidden_layers=LANGUAGE_LAYERS,
                num_attention_heads=LANGUAGE_WIDTH // 64,
                num_key_value_heads=LANGUAGE_WIDTH // 64,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
            ).to_dict(),
            image_token_index=IMAGE,
            image_seq_length=GRID * GRID,
            projector_hidden_act="gelu",
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            hiprune={"object_layer": OBJECT_LAYER},
        )
    )
    llava.model.vision_tower = clip.vision_model
    _place(clip.vision_model.embeddings.position_embedding)
    return llava, clip


def _place(embedding: nn.Embedding) -> None:
    """Starts positions as sines of row and column, so that places can be read from the first step."""
    quarter = WIDTH // 4
    rates = torch.exp(torch.arange(quarter) * (-torch.log(torch.tensor(10000.0)) / quarter))  # (WIDTH / 4,)
    along = torch.arange(GRID)[:, None] * rates  # (GRID, WIDTH / 4)
    wave = torch.cat([along.sin(), along.cos()], dim=1)  # (GRID, WIDTH / 2)
    rows = wave[:, None].expand(GRID, GRID, -1)
    columns = wave[None].expand(GRID, GRID, -1)
    grid = torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, WIDTH)
    with torch.no_grad():
        embedding.weight.copy_(torch.cat([torch.zeros(1, WIDTH), 0.2 * grid]))


def image_processor() -> CLIPImageProcessor:
    """What a picture goes through on its way in."""
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def save(llava: LlavaForConditionalGeneration, clip: CLIPModel, folder: Path) -> None:
    """Writes `llava/` and `clip/` as Hugging Face lays models out, 15 MB a file; both are then halves."""
    pixels, text = image_processor(), tokenizer()
    for name, model in (("llava", llava), ("clip", clip)):
        # its own type goes into the config too; the head is tied to the embedding, and not written twice
        model.half().save_pretrained(folder / name, max_shard_size="15MB")
        text.save_pretrained(folder / name)
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=text,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    processor.save_pretrained(folder / "llava")
    pixels.save_pretrained(folder / "clip")
    # CLIP's text tower pools at the end token, so its tokenizer writes one
    path = folder / "clip" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
