"""Prunes the tokens of an encoder of one's own: a CLIP from transformers, on any device. No service encodes.

python examples/python/prune_tokens.py CLIP IMAGE QUESTION [LAYER]      CLIP: a directory or a hub id

LAYER is the one whose attention finds objects; unless given, the share of the depth that 9 is of CLIP-L's 24.

Needs torch, transformers and Pillow, and a pruner: `hiprune up` has one.
"""

import asyncio
import os
import sys
from collections import Counter

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from hiprune import Client, HipruneError, View, policy

ADDRESS = os.environ.get("HIPRUNE_PRUNER_ADDRESS", "127.0.0.1:50052")


@torch.inference_mode()
def encode(clip: CLIPModel, name: str, path: str) -> View:
    """One view: tokens, the attention that each receives in each layer, and each in the text's space."""
    with Image.open(path) as image:
        pixels = AutoImageProcessor.from_pretrained(name)(images=image.convert("RGB"), return_tensors="pt")
    output = clip.vision_model(
        pixels["pixel_values"].to(clip.device), output_hidden_states=True, output_attentions=True
    )
    features = output.hidden_states[-2][0, 1:]  # (N, D), the CLS in front left out
    aligned = clip.visual_projection(clip.vision_model.post_layernorm(features))  # (N, A)
    attention = {  # by layer, from 1 on: (N,), summed over queries, the mean over heads
        layer: matrix[0].sum(dim=1).mean(dim=0)[1:] for layer, matrix in enumerate(output.attentions[:-1], 1)
    }
    side = round(features.shape[0] ** 0.5)
    return View(grid=(side, side), features=features, aligned=aligned, attention=attention)


@torch.inference_mode()
def read(clip: CLIPModel, name: str, question: str) -> torch.Tensor:
    """The question as a vector in the same space: (A,)."""
    tokens = AutoTokenizer.from_pretrained(name)(question, return_tensors="pt").to(clip.device)
    return clip.text_projection(clip.text_model(**tokens).pooler_output)[0]


async def main(name: str, path: str, question: str, layer: str = "") -> None:
    """Encodes here, prunes there."""
    clip = CLIPModel.from_pretrained(name, attn_implementation="eager").eval()
    clip = clip.to("cuda" if torch.cuda.is_available() else "cpu")
    layers = clip.config.vision_config.num_hidden_layers
    chosen = policy("hiprune++", keep=1 / 3, object_layer=int(layer or round(layers * 9 / 24)))
    async with Client(pruner=ADDRESS, key=os.environ.get("HIPRUNE_KEY", "")) as client:
        pruned = await client.prune_tokens(
            encode(clip, name, path), policy=chosen, text_vector=read(clip, name, question)
        )
    (view,) = pruned.views
    kept = view.features.torch()  # (K, D): what your language model's projector takes
    print(f"{pruned.tokens_before} tokens became {pruned.tokens_kept}: {dict(Counter(view.kinds))}")
    print(f"features {tuple(kept.shape)} {kept.dtype}, rows {list(view.kept_indices)[:8]} …")


try:
    asyncio.run(main(*sys.argv[1:5]))
except HipruneError as error:
    sys.exit(f"{type(error).__name__}: {error}")
