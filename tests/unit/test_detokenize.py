"""Claims about text from tokens, on three kinds of tokenizer: words, byte-level BPE, and byte fallback."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hiprune.config import EMBEDDED_MODEL
from services.llm.detokenize import Detokenizer, StopFilter


def words() -> Tokenizer:
    """The embedded model's: whole words, decoded with a space between."""
    return Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))


def byte_level() -> Tokenizer:
    """GPT's kind (Qwen): every byte is a token, and a few longer ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    merges = [("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama's kind (Vicuna): words begin with ▁, bytes for what has no token, one leading space goes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("▁", "▁the", "▁a", "cat", "▁cat", "s", ".", "▁▁", "é"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (words, byte_level, byte_fallback)}


def deltas(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = Detokenizer(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    return pieces, text.stopped


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The plain reference: the text before the stop string that is completed first."""
    met = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(met)[1]], True) if met else (text, False)


def token_runs(kind: str) -> st.SearchStrategy[list[int]]:
    """Ids of any tokens in any order; with byte fallback, bytes come as whole characters."""
    size = TOKENIZERS[kind].get_vocab_size()
    if kind != "byte_fallback":
        return st.lists(st.integers(0, size - 1), max_size=40)
    alone = st.integers(0, size - 1).filter(lambda token: not 3 <= token < 259).map(lambda token: [token])
    spelt = st.characters(exclude_categories=["Cs"]).map(lambda c: [3 + byte for byte in c.encode()])
    return st.lists(alone | spelt, max_size=40).map(lambda runs: list(chain.from_iterable(runs)))


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_deltas_together_are_the_decoding_of_all_tokens(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(token_runs(kind))
    pieces, _ = deltas(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(3, 258), max_size=20))
@settings(max_examples=150, deadline=None)
def test_broken_bytes_show_as_such_and_the_words_around_them_survive(ids):
    tokenizer = TOKENIZERS["byte_fallback"]
    cat = tokenizer.token_to_id("▁cat")
    pieces, _ = deltas(tokenizer, [cat, *ids, cat])
    text = "".join(pieces)
    assert text.startswith("cat")
    assert text.endswith(" cat")
    assert "\ufffd" in text or text == tokenizer.decode([cat, *ids, cat])


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_a_character_of_several_tokens_comes_out_whole(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids if kind == "byte_level" else [3 + byte for byte in text.encode()]
    pieces, _ = deltas(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_completes_shows_as_broken():
    tokenizer = TOKENIZERS["byte_fallback"]
    cat = tokenizer.token_to_id("cat")
    pieces, _ = deltas(tokenizer, [cat, *(3 + byte for byte in "€".encode()[:-1])])
    assert "".join(pieces) == "cat\ufffd\ufffd"


def test_special_tokens_are_skipped():
    tokenizer = words()
    ids = [tokenizer.token_to_id(token) for token in ("a", "ASSISTANT:", "red", "</s>", "ring")]
    assert "".join(deltas(tokenizer, ids)[0]) == "a red ring"


@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=4), max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4).map(tuple),
)
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_stop_string_completed_first_however_it_arrives(chunks, stops):
    passing = StopFilter(stops)
    out = "".join([passing.push(chunk) for chunk in chunks] + [passing.finish()])
    assert (out, passing.stopped) == cut("".join(chunks), stops)


@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=4), max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4).map(tuple),
)
@settings(max_examples=200, deadline=None)
def test_no_more_text_is_held_back_than_might_begin_a_stop_string(chunks, stops):
    passing, seen, out = StopFilter(stops), "", ""
    for chunk in chunks:
        seen += chunk
        out += passing.push(chunk)
        if passing.stopped:
            return
        held = seen[len(out) :]
        assert seen.startswith(out)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_over_several_tokens_is_met_and_never_emitted():
    tokenizer = words()
    ids = tokenizer.encode("the red ring and the blue star", add_special_tokens=False).ids
    pieces, stopped = deltas(tokenizer, ids, ("ring and",))
    assert stopped
    assert "".join(pieces) == "the red "


def test_text_that_only_began_a_stop_string_comes_out_in_the_end():
    tokenizer = words()
    ids = tokenizer.encode("the red ring", add_special_tokens=False).ids
    pieces, stopped = deltas(tokenizer, ids, ("ring and",))
    assert not stopped
    assert "".join(pieces) == "the red ring"
