"""A checkpoint's tokenizer and chat template, used as its stock processor does. Knows no wire, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hiprune.checkpoints import CheckpointError, read_json

Turns = Sequence[Mapping[str, Any]]
"""A conversation as chat templates take it: `{"role": …, "content": [{"type": "text", "text": …}, …]}`."""

_PROBE = "probe"


class Chat:
    """Conversations to token ids. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Any, template: str, image_token_id: int, video_token_id: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        """The tokenizer itself, for decoding."""
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        placeholders = [each for each in (image_token_id, video_token_id) if each is not None]
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials |= {*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(placeholders)}
        self.reserved: tuple[str, ...] = tuple(sorted(filter(None, specials)))
        """Strings that a person's text must not contain: they would be read as the template's own."""
        self._reserved_ids = {tokenizer.convert_tokens_to_ids(token) for token in self.reserved} - {
            tokenizer.unk_token_id  # any unknown word
        }
        self.takes_system = self._probe_system()
        """Whether the template has a place for the system's turn."""

    def render(self, turns: Turns) -> str:
        """The conversation as text, up to where the answer begins. Raises jinja2.TemplateError."""
        text: str = self._tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        return text

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation, with one placeholder token for each media item."""
        begun = self._tokenizer.bos_token is not None and rendered.startswith(self._tokenizer.bos_token)
        ids: list[int] = self.backend.encode(rendered, add_special_tokens=not begun).ids
        return ids

    def reserved_in(self, text: str) -> str:
        """A reserved token that this text contains or would be read as; empty when there is none."""
        for reserved in self.reserved:
            if reserved in text:
                return reserved
        # a tokenizer that normalises before it looks for special tokens finds more than the text shows
        encoded = self.backend.encode(text, add_special_tokens=False)
        for token_id, token in zip(encoded.ids, encoded.tokens, strict=True):
            if token_id in self._reserved_ids:
                return token
        return ""

    def _probe_system(self) -> bool:
        """A place of its own: rendered, as text, and neither as the user's nor as the model's words."""
        from jinja2 import TemplateError

        asked = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        shown = {}
        for role in ("system", "user", "assistant"):
            told = {"role": role, "content": [{"type": "text", "text": _PROBE}]}
            try:
                shown[role] = self.render([told, asked])
            except TemplateError:
                shown[role] = ""
        system = shown.pop("system")
        return _PROBE in system and "'type'" not in system and system not in shown.values()


def load_chat(path: Path, image_token_id: int, video_token_id: int | None = None) -> Chat:
    """The chat of a checkpoint's directory. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded ({error})") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(f"{path}: no tokenizer.json, expected a tokenizer of the tokenizers library")
    template = _template_of(path) or tokenizer.chat_template
    if not isinstance(template, str):
        raise CheckpointError(f"{path}: no chat template (chat_template.jinja), expected one")
    return Chat(tokenizer, template, image_token_id, video_token_id)


def _template_of(path: Path) -> str:
    """The processor's template, from the files that it looks at, in its order; empty when there is none."""
    for name in ("processor_config.json", "chat_template.json"):
        file = path / name
        template = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, str):
            return template
    raw = path / "chat_template.jinja"
    return raw.read_text("utf-8") if raw.is_file() else ""
