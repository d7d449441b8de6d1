"""What is learned, and from what: one forward of both models over a batch, and its losses.

The tower learns from what scenes know of their patches: which thing, what kind, colour and size, where its
middle is; and from words, as CLIP does, but patch by patch, so that a question finds its patches. The
language model learns from answers, and, once it learns alone, from what an answer is made of: what the
phrases of a question speak of, and how many things there are. The heads that ask for all this but answers
are thrown away.

Tokens are thinned in training. Patches before the tower, to save time: of the background, since a shape of
which patches are missing is not learned. Features before the language model: always by another share, and
with another preference for things or for background, so that the share of foreground among the tokens tells
nothing, neither a count nor which method thinned them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, LlavaForConditionalGeneration

from models.shapes import architecture
from models.shapes.architecture import EOS, LANGUAGE_WIDTH, LAYERS, WIDTH
from models.shapes.batches import IGNORED, PREFIX, Batch
from models.shapes.questions import plural
from models.shapes.scenes import COLOURS, GRID, KINDS, MOST_THINGS, PATCH, SIZES


@dataclass(frozen=True)
class Thinning:
    """Shares of tokens: of patches that the tower sees, and of features that the language model sees."""

    seen: float
    read: float


@dataclass(frozen=True)
class Reading:
    """What the language model makes of K image tokens and S question tokens of each of B pictures."""

    logits: torch.Tensor  # (A, words), of the answers' tokens
    labels: torch.Tensor  # (A)
    images: list[torch.Tensor]  # (B, K, H) before the first layer and after each
    texts: list[torch.Tensor]  # (B, S, H), likewise


class Learner(nn.Module):
    """Both models and the heads that are thrown away."""

    def __init__(self, llava: LlavaForConditionalGeneration, clip: CLIPModel, phrases: torch.Tensor) -> None:
        """`phrases` are the ids (P, L) of `phrase_texts`."""
        super().__init__()
        self.llava, self.clip = llava, clip
        self.norm = nn.LayerNorm(WIDTH)
        self.kind = nn.Linear(WIDTH, len(KINDS) + 1)
        self.colour = nn.Linear(WIDTH, len(COLOURS) + 1)
        self.size = nn.Linear(WIDTH, len(SIZES) + 1)
        self.middle = nn.Linear(WIDTH, 2)
        self.place = nn.Linear(WIDTH, 2)
        self.mask = nn.Linear(WIDTH, PATCH * PATCH)
        self.named = nn.Linear(LANGUAGE_WIDTH, 2 + len(KINDS) + len(COLOURS) + len(SIZES))
        self.number = nn.Linear(LANGUAGE_WIDTH, MOST_THINGS + 1)
        self.mark = nn.Linear(LANGUAGE_WIDTH, 1)
        nn.init.constant_(self.mark.bias, -3)  # few tokens are marked
        self.apart = nn.Linear(LANGUAGE_WIDTH, 2)
        self.register_buffer("centre", torch.zeros(WIDTH))
        self.register_buffer("whitener", torch.eye(WIDTH))
        self.register_buffer("phrases", phrases, persistent=False)
        at = torch.arange(GRID) / (GRID - 1)
        grid = torch.stack([at.expand(GRID, GRID), at[:, None].expand(GRID, GRID)], dim=-1)
        self.register_buffer("places", grid.reshape(GRID * GRID, 2), persistent=False)  # (N, 2): x, y

    def see(self, batch: Batch, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, M, D) of the kept (B, M) patches as LLaVA takes them; CLIP's picture vector (B, A)."""
        tower = self.clip.vision_model
        hidden = tower.embeddings(batch.pixels)  # (B, 1 + N, D)
        patches = hidden[:, 1:].gather(1, kept[..., None].expand(-1, -1, WIDTH))
        hidden = tower.pre_layrnorm(torch.cat([hidden[:, :1], patches], dim=1))
        features = hidden
        for order, layer in enumerate(tower.encoder.layers, start=1):
            hidden = layer(hidden, None)
            if order == LAYERS - 1:
                features = hidden
        return features[:, 1:], self._aligned(hidden[:, 0])

    def vision_losses(
        self, batch: Batch, kept: torch.Tensor, features: torch.Tensor, picture: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses of tower and text encoder: `features` (B, M, D) of `kept` (B, M), `picture` (B, A)."""
        owners = batch.owners.gather(1, kept)  # (B, M)
        kinds, colours = batch.kinds.gather(1, owners), batch.colours.gather(1, owners)
        sizes = batch.sizes.gather(1, owners)
        middles = batch.middles.gather(1, owners[..., None].expand(-1, -1, 2))  # (B, M, 2)
        thing = owners > 0
        seen = self.norm(features)
        losses = {
            "kind": _balanced(self.kind(seen), kinds, thing),
            "colour": _balanced(self.colour(seen), colours, thing),
            "size": _balanced(self.size(seen), sizes, thing),
            "middle": F.smooth_l1_loss(self.middle(seen)[thing], middles[thing], beta=0.05),
            "place": F.smooth_l1_loss(self.place(seen), self.places[kept], beta=0.05),
            "mask": self._mask(batch, kept, seen, thing),
        }
        losses |= self._dense(features, kinds, colours, thing)
        losses["found"] = self._found(batch, owners, features)
        losses["contrast"] = self._contrast(batch, picture)
        return losses

    def read(self, batch: Batch, features: torch.Tensor, read: torch.Tensor) -> Reading:
        """Reads `read` (B, K) of the features (B, M, D), and the questions.

        All questions of a picture stand behind its tokens in one sequence; each sees the picture and itself.
        """
        images = features.gather(1, read[..., None].expand(-1, -1, WIDTH))
        images = (images.float() - self.centre) @ self.whitener
        images = self.llava.model.multi_modal_projector(images)  # (B, K, H)
        embed = self.llava.model.language_model.embed_tokens
        prefix = embed(torch.tensor(PREFIX, device=images.device)).expand(len(images), -1, -1)
        rows = torch.cat([prefix, images, embed(batch.ids)], dim=1)  # (B, S, H)
        begin, before = prefix.shape[1], prefix.shape[1] + images.shape[1]
        positions = torch.cat(
            [torch.arange(before, device=rows.device).expand(len(rows), -1), before + batch.offsets], dim=1
        )
        branches = F.pad(batch.branches, (before, 0), value=0)  # (B, S)
        order = torch.arange(rows.shape[1], device=rows.device)
        seen = (order[None, :, None] >= order[None, None, :]) & (
            (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        )
        mask = torch.zeros(seen.shape, dtype=rows.dtype, device=rows.device)
        mask.masked_fill_(~seen, torch.finfo(rows.dtype).min)
        made = self.llava.model.language_model(
            inputs_embeds=rows,
            attention_mask=mask[:, None],
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
        wanted = batch.labels != IGNORED
        return Reading(
            self.llava.lm_head(made.last_hidden_state[:, before:][wanted]),
            batch.labels[wanted],
            [hidden[:, begin:before] for hidden in made.hidden_states],
            [hidden[:, before:] for hidden in made.hidden_states],
        )

    def lessons(self, batch: Batch, owners: torch.Tensor, reading: Reading) -> dict[str, torch.Tensor]:
        """Losses of what answers are made of; `owners` (B, K) of the tokens read.

        After the second layer, a token of each thing is marked, and a phrase that fits one thing knows which;
        after the third, how many things a phrase fits, and how far apart two things are that a question
        compares. The fourth is left for the answer.
        """
        second, third = 2, 3
        marks = self.mark(_normal(reading.images[second]))[..., 0].float()
        wanted = batch.phrase_ends >= 0
        fits = batch.phrase_fits[wanted]  # (F, T + 1)
        rows = wanted.nonzero()[:, 0]
        ends = batch.phrase_ends[wanted]
        one = fits.sum(-1) == 1
        named = self.named(_normal(reading.texts[second][rows[one], ends[one]])).float()
        middle, kind, colour, size = named.split([2, len(KINDS), len(COLOURS), len(SIZES)], dim=-1)
        only = batch.phrase_fits.int().argmax(-1)  # (B, P): of a phrase that fits one thing, which
        at = rows[one], only[wanted][one]
        numbers = self.number(_normal(reading.texts[third][rows, ends])).float()
        order, later = (batch.phrase_befores >= 0).nonzero(as_tuple=True)  # (R), (R): picture, phrase
        earlier = batch.phrase_befores[order, later]
        gone = batch.middles[order, only[order, earlier]] - batch.middles[order, only[order, later]]
        compared = reading.texts[third][order, batch.phrase_ends[order, later]]
        return {
            "marked": unlikely_once(marks, owners),
            "named middle": F.smooth_l1_loss(middle, batch.middles[at], beta=0.05),
            "named kind": F.cross_entropy(kind, batch.kinds[at] - 1),
            "named colour": F.cross_entropy(colour, batch.colours[at] - 1),
            "named size": F.cross_entropy(size, batch.sizes[at] - 1),
            "number": F.cross_entropy(numbers, fits.sum(-1)),
            "apart": F.smooth_l1_loss(self.apart(_normal(compared)).float(), gone, beta=0.05),
        }

    def start_reading(self, features: torch.Tensor) -> None:
        """A new language model, and a projector that begins with every direction of features (F, D) alike.

        A tower's features differ ten thousand times as much in some directions as in others, and where a
        thing is lies in small ones: a projector that starts anywhere else does not hear of it for long.
        """
        fresh = architecture.build()[0].model
        self.llava.model.language_model.load_state_dict(fresh.language_model.state_dict())
        projector = self.llava.model.multi_modal_projector
        with torch.no_grad():
            for layer, gain in ((projector.linear_1, 1.0), (projector.linear_2, 0.2)):
                layer.weight.normal_(0, gain * layer.in_features**-0.5)
                layer.bias.zero_()
            self.centre.copy_(features.mean(0))
            values, vectors = torch.linalg.eigh(torch.cov(features.T.double()))
            self.whitener.copy_(vectors * values.clamp(min=1e-3).rsqrt() @ vectors.T)

    def fold(self) -> None:
        """Puts what evens the features into the projector's first layer: it then takes them as they are."""
        first = self.llava.model.multi_modal_projector.linear_1
        with torch.no_grad():
            first.weight.copy_(first.weight @ self.whitener)
            first.bias.sub_(first.weight @ self.centre)
            self.centre.zero_()
            self.whitener.copy_(torch.eye(WIDTH))

    def _aligned(self, features: torch.Tensor) -> torch.Tensor:
        """In the text encoder's space, of length 1: what the service compares questions with."""
        projected = self.clip.visual_projection(self.clip.vision_model.post_layernorm(features))
        return F.normalize(projected.float(), dim=-1)

    def _text(self, ids: torch.Tensor) -> torch.Tensor:
        """Text vectors (T, A) of length 1 of ids (T, L) that end with EOS."""
        hidden = self.clip.text_model(input_ids=ids).last_hidden_state  # (T, L, D)
        ends = (ids == EOS).int().argmax(dim=1)
        pooled = self.clip.text_projection(hidden[torch.arange(len(ids), device=ids.device), ends])
        return F.normalize(pooled.float(), dim=-1)

    def _scale(self) -> torch.Tensor:
        return self.clip.logit_scale.exp().clamp(max=100)

    def _mask(
        self, batch: Batch, kept: torch.Tensor, seen: torch.Tensor, thing: torch.Tensor
    ) -> torch.Tensor:
        """Which pixels of a thing's patch are the thing: its outline, and so its kind."""
        masks = batch.masks.gather(1, kept[..., None].expand(-1, -1, PATCH * PATCH))
        return F.binary_cross_entropy_with_logits(self.mask(seen[thing]).float(), masks[thing].float())

    def _dense(
        self, features: torch.Tensor, kinds: torch.Tensor, colours: torch.Tensor, thing: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        aligned = self._aligned(features)  # (B, M, A)
        logits = self._scale() * aligned @ self._text(self.phrases).T  # (B, M, P)
        whole, some_colours, some_kinds = logits.split(
            [1 + len(COLOURS) * len(KINDS), len(COLOURS), 2 * len(KINDS)], dim=-1
        )
        label = torch.where(thing, 1 + (colours - 1) * len(KINDS) + kinds - 1, 0)
        one, many = some_kinds.chunk(2, dim=-1)
        by_kind = torch.logaddexp(one, many)
        return {
            "dense": _balanced(whole, label, thing),
            "dense colour": F.cross_entropy(some_colours[thing], colours[thing] - 1),
            "dense kind": F.cross_entropy(by_kind[thing], kinds[thing] - 1),
        }

    def _found(self, batch: Batch, owners: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """How little of a question's attention to patches falls on what it speaks of: text to patch."""
        size, number, length = batch.question_ids.shape
        texts = self._text(batch.question_ids.reshape(-1, length)).reshape(size, number, -1)
        logits = self._scale() * torch.einsum("bqa,bma->bqm", texts, self._aligned(features))
        about = batch.about.gather(2, owners[:, None].expand(-1, number, -1))  # (B, Q, M)
        able = about.any(-1)
        right = logits.masked_fill(~about, -1e4).logsumexp(-1)[able]
        return (logits.logsumexp(-1)[able] - right).mean()

    def _contrast(self, batch: Batch, picture: torch.Tensor) -> torch.Tensor:
        logits = self._scale() * picture @ self._text(batch.captions).T  # (B, B)
        label = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2


def phrase_texts() -> list[str]:
    """What patches are compared with: background, colour and kind, colour, kind, and kind as plural."""
    return [
        "background",
        *(f"a {colour} {kind}" for colour in COLOURS for kind in KINDS),
        *(f"{colour} shape" for colour in COLOURS),
        *(f"the {kind}" for kind in KINDS),
        *(plural(kind) for kind in KINDS),
    ]


def things_whole(owners: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    """Ascending indices (B, K) of a share of patches (B, N): those of things, those around, some others."""
    near = (owners > 0).float().reshape(-1, 1, GRID, GRID)
    near = F.max_pool2d(near, 3, stride=1, padding=1).flatten(1)  # (B, N)
    return _highest(near + torch.rand(owners.shape, generator=draw), share)


def thinned(owners: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    """Ascending indices (B, K) of a share of tokens (B, N), each picture with its own taste for things.

    A token of each thing stays: who is asked about what cannot be seen learns to guess.
    """
    # Gumbel's trick: the taste is a factor on a thing's chance. From 1/5 to 55, things are a fiftieth to four
    # fifths of what is read, and a method that prefers them meets a reader that has seen the like
    taste = -1.6 + 5.6 * torch.rand(len(owners), 1, generator=draw)
    noise = -torch.log(-torch.log(torch.rand(owners.shape, generator=draw).clamp(1e-9, 1 - 1e-7)))
    scores = noise + taste * (owners > 0)
    for thing in range(1, MOST_THINGS + 1):
        mine = owners == thing
        best = scores.masked_fill(~mine, -torch.inf).argmax(1, keepdim=True)
        scores.scatter_add_(1, best, 1e4 * mine.any(1, keepdim=True))
    return _highest(scores, share)


def _normal(hidden: torch.Tensor) -> torch.Tensor:
    """As a layer reads it: of one length."""
    return F.rms_norm(hidden, hidden.shape[-1:])


def unlikely_once(marks: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Minus the logarithm of the chance that of each thing one token is marked and of the background none, a
    thing; by logits (B, K) that a token is, and by owners (B, K).

    Which of a thing's tokens it is stays open: some patches show so little of it that none can say whether
    they are of it, and a rule such as "the first" hangs on them.
    """
    of = owners[..., None] == torch.arange(MOST_THINGS + 1, device=owners.device)  # (B, K, T + 1)
    none = (F.logsigmoid(-marks)[..., None] * of).sum(1)  # (B, T + 1)
    any_one = marks[..., None].masked_fill(~of, -1e4).logsumexp(1)  # by odds: with `none`, one and no other
    there = of.any(1)
    there[:, 0] = False
    return -((none + any_one)[there].sum() + none[:, 0].sum()) / there.sum()


def _highest(scores: torch.Tensor, share: float) -> torch.Tensor:
    kept = max(1, round(share * scores.shape[1]))
    return scores.topk(kept, dim=1).indices.sort(dim=1).values


def _balanced(logits: torch.Tensor, labels: torch.Tensor, thing: torch.Tensor) -> torch.Tensor:
    """Cross entropy, things and background averaged apart: nine patches of ten show none."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    flat = thing.flatten()
    return 0.5 * (loss[flat].mean() + loss[~flat].mean())
