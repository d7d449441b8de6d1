"""Claims about keys, the tenants file, and what happens when it changes."""

from __future__ import annotations

import asyncio
import logging
import os
from datetime import date
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from hiprune import tenants as keys_of
from hiprune.auth import Limits
from hiprune.config import ConfigError, ServiceSettings
from hiprune.door import Door
from hiprune.tenants import TenantsWatch, new_key, of_file, parse
from hiprune.v1 import pruner_service_pb2 as pb

TODAY = date(2026, 11, 22)


def entry_of(key_entry) -> str:
    return f"{{id: '{key_entry.id}', salt: '{key_entry.salt}', sha256: '{key_entry.sha256}'}}"


def text_of(**keys) -> str:
    tenants = "\n".join(f"  {name}:\n    keys: [{entry_of(entry)}]" for name, entry in keys.items())
    return f"tenants:\n{tenants}\n"


# --- keys ------------------------------------------------------------------------------------------------


def test_a_key_opens_its_own_account_and_no_near_miss_does():
    (ours, our_entry), (theirs, their_entry) = new_key(TODAY), new_key(TODAY)
    tenants = of_file(parse(text_of(acme=our_entry, other=their_entry), "f"))
    assert tenants.of_key(ours).name == "acme"
    assert tenants.of_key(theirs).name == "other"
    prefix, key_id, secret = ours.split("_", 2)
    crossed = f"{prefix}_{key_id}_{theirs.split('_', 2)[2]}"
    altered = ours[:-2] + ("A" if ours[-2] != "A" else "B") + ours[-1]
    for wrong in ("", "x", crossed, altered, ours[:-1], ours + "a", ours.upper(), f" {ours}", secret, key_id):
        assert tenants.of_key(wrong) is None


def test_keys_are_of_256_bits_and_never_the_same():
    keys = {new_key(TODAY)[0] for _ in range(1000)}
    assert len({key.split("_", 2)[1] for key in keys}) == len({key.split("_", 2)[2] for key in keys}) == 1000
    assert {len(key.split("_", 2)[2]) for key in keys} == {43}  # 43 characters of 6 bits


def test_the_file_holds_nothing_of_a_key_but_a_salted_hash():
    key, entry = new_key(TODAY)
    kept = text_of(acme=entry)
    secret = key.split("_", 2)[2]
    assert not any(secret[i : i + 6] in kept for i in range(len(secret) - 6))
    assert entry.salt != new_key(TODAY)[1].salt
    assert not entry.model_copy(update={"salt": "0" * 32}).fits(key)


def test_one_key_under_two_salts_leaves_two_hashes_that_show_no_kinship():
    """So that two stolen files, or two entries of one, do not tell that a key is in both."""
    key, entry = new_key(TODAY)
    salts = [f"{number:032x}" for number in range(64)]
    hashes = [bytes.fromhex(keys_of._digest(key, salt)) for salt in salts]
    assert len(set(hashes)) == 64
    assert len({each[:4] for each in hashes}) == len({each[-4:] for each in hashes}) == 64
    assert all(
        entry.model_copy(update={"salt": salt, "sha256": hashed.hex()}).fits(key)
        for salt, hashed in zip(salts, hashes, strict=True)
    )


# --- the file ----------------------------------------------------------------------------------------------

WHOLE = """
tenants:
  acme:
    limits: {requests_per_minute: 60, tokens_per_minute: 2000, concurrency: 4, max_image_bytes: 1000}
    policy: {method: hiprune++, keep_ratio: 0.25, beta: 0}
  idle: {}
"""


def test_limits_and_the_default_policy_are_the_files():
    tenants = of_file(parse(WHOLE, "f"))
    acme = tenants.named("acme")
    assert acme.limits == Limits(60, 2000, 4, 1000, None)
    assert acme.policy == pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.25, beta=0.0)
    assert acme.policy.HasField("beta")
    assert tenants.named("idle").limits == Limits()
    assert tenants.named("nobody") is None


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("tenants: [", 1, "is not YAML"),
        (
            "tenants:\n  acme:\n    limits:\n      concurrency: 0\n",
            4,
            "tenants.acme.limits.concurrency: got '0'",
        ),
        ("tenants:\n  acme:\n    limits: {concurrency: '4'}\n", 3, "concurrency: got '4'"),
        ("tenants:\n  acme:\n    limits: {concurrency: yes}\n", 3, "concurrency: got 'True'"),
        ("tenants:\n  acme:\n    limit: {}\n", 3, "tenants.acme.limit"),
        ("tenants:\n  acme: {}\n  acme: {}\n", 3, "tenants.acme: comes twice"),
        ("tenants:\n\n  ACME: {}\n", 3, "tenants.ACME"),
        ("tenants:\n  a:\n    policy: {method: foo}\n", 3, "got 'foo', expected one of none, hiprune"),
        ("tenants:\n  a:\n    policy: {keep_count: 1, keep_ratio: 1}\n", 3, "expected one of them"),
        ("tenants:\n  a:\n    policy:\n      keep_ratio: .nan\n", 4, "keep_ratio: got 'nan'"),
        ("tenants:\n  a: &x {}\n  b: *x\n", 2, "anchors and aliases are not taken"),
        ("tenants:\n  a: !!python/object:os.system {}\n", 2, "not taken"),
        ("tenants:\n  a: {keys: [{id: 00}]}\n", 2, "tenants.a.keys.0.id"),
        ("tenants:\n  a: !!bool maybe\n", 2, "tenants.a: is not what its tag"),
        ("tenants:\n  a: !!timestamp soon\n", 2, "tenants.a: is not what its tag"),
        ("tenants:\n  a: !!int ''\n", 2, "tenants.a: is not what its tag"),
        ("- tenants\n", 1, "the file"),
    ],
)
def test_a_broken_file_is_refused_by_line_and_field(text, line, said):
    with pytest.raises(ConfigError) as refused:
        parse(text, "tenants.yaml")
    assert str(refused.value).startswith(f"tenants.yaml:{line}: ")
    assert said in str(refused.value)


def test_two_keys_of_one_id_are_refused():
    entry = new_key(TODAY)[1]
    with pytest.raises(ConfigError, match=f"tenants.other.keys: id {entry.id} is another key's"):
        parse(text_of(acme=entry, other=entry), "f")


def test_an_error_repeats_nothing_that_is_kept_of_keys():
    entry = new_key(TODAY)[1]
    broken = text_of(acme=entry).replace(entry.sha256, entry.sha256 + "0")
    with pytest.raises(ConfigError, match=r"tenants\.acme\.keys\.0\.sha256") as refused:
        parse(broken, "f")
    assert entry.sha256 not in str(refused.value)


def test_a_small_file_that_would_be_a_large_one_is_refused_at_once():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{one}: &{one} [{', '.join(['*' + other] * 9)}]\n"
        for other, one in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ConfigError, match="aliases"):
        parse(bomb, "f")
    with pytest.raises(ConfigError):
        parse("[" * 100_000, "f")


@hypothesis.settings(max_examples=150, derandomize=True)
@hypothesis.given(
    st.lists(
        st.sampled_from([*"{}[]:,-&*!|>'\"%@` \n\t?#", "tenants", "a", "limits", "1", ": ", "\n  "])
    ).map("".join)
)
def test_any_text_is_a_file_or_a_config_error(text):
    try:
        of_file(parse(text, "f"))
    except ConfigError as error:
        said = str(error)
    else:
        said = "f:"
    assert said.startswith("f:")


# --- a file that changes -----------------------------------------------------------------------------------


class File:
    """A tenants file as an operator treats one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str, mode: int = 0o640) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(mode)
        fresh.replace(self.path)


@pytest.fixture
def file(tmp_path):
    return File(tmp_path / "tenants.yaml")


def test_keys_come_and_go_with_the_file(file):
    (ours, our_entry), (theirs, their_entry) = new_key(TODAY), new_key(TODAY)
    file.write(text_of(acme=our_entry))
    watch = TenantsWatch(file.path)
    assert watch.of_key(ours).name == "acme"
    assert watch.of_key(theirs) is None
    file.write(text_of(other=their_entry))
    assert watch.of_key(ours) is not None  # until it is looked at
    watch.look()
    assert watch.of_key(ours) is None
    assert watch.of_key(theirs).name == "other"


def test_a_change_in_place_is_noticed_too(file):
    key, entry = new_key(TODAY)
    file.write(text_of(acme=entry))
    watch = TenantsWatch(file.path)
    with file.path.open("w") as opened:
        opened.write("tenants: {}\n")
    watch.look()
    assert watch.of_key(key) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write("tenants:\n  acme: [\n"),
        lambda file: file.write("tenants:\n  acme:\n    limits: {concurrency: -1}\n"),
        lambda file: file.write("tenants: {}\n", mode=0o644),
        lambda file: file.path.write_bytes(b"tenants: \xff\n"),
        lambda file: file.path.unlink(),
    ],
    ids=["not YAML", "a wrong value", "anybody may read it", "not UTF-8", "gone"],
)
def test_a_file_that_breaks_leaves_the_last_good_one_in_force_and_says_so_once(file, spoil, caplog):
    key, entry = new_key(TODAY)
    file.write(text_of(acme=entry))
    watch = TenantsWatch(file.path)
    spoil(file)
    with caplog.at_level(logging.ERROR, "hiprune.tenants"):
        watch.look()
        watch.look()
    assert watch.of_key(key).name == "acme"
    (record,) = caplog.records
    assert "stay as they were" in record.message
    assert str(file.path) in record.message
    file.write("tenants: {}\n")
    watch.look()
    assert watch.of_key(key) is None


def test_permissions_that_are_put_right_are_noticed_as_a_write_is(file):
    old, entry = new_key(TODAY)
    file.write(text_of(acme=entry))
    watch = TenantsWatch(file.path)
    new, entry = new_key(TODAY)
    file.write(text_of(acme=entry))
    file.path.chmod(0o644)
    watch.look()
    assert watch.of_key(old) is not None
    file.path.chmod(0o640)  # as the log says
    watch.look()
    assert watch.of_key(old) is None
    assert watch.of_key(new).name == "acme"


@pytest.mark.parametrize(
    ("content", "warned"), [("tenants: {}\n", True), ("tenants: {anonymous: {}}\n", False)]
)
def test_strangers_without_limits_beside_tenants_are_warned_of(file, content, warned, caplog):
    file.write(content)
    Door.of(ServiceSettings(tenants=str(file.path), allow_anonymous=True))
    assert ("who brings no key has no limits" in caplog.text) is warned


async def test_a_look_that_fails_in_an_unknown_way_is_not_the_last(file, monkeypatch, caplog):
    file.write("tenants: {}\n")
    watch, looks = TenantsWatch(file.path), []

    def look() -> None:
        looks.append(1)
        raise RuntimeError("who knows")

    async def sleep(_: float) -> None:
        if len(looks) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(watch, "look", look)
    with pytest.raises(asyncio.CancelledError):
        await watch.watch(sleep)
    assert caplog.text.count("could not be looked at") == 2


def test_the_line_and_field_of_a_reload_that_fails_are_in_the_log(file, caplog):
    file.write("tenants: {}\n")
    watch = TenantsWatch(file.path)
    file.write("tenants:\n  acme:\n    limits: {concurrency: -1}\n")
    with caplog.at_level(logging.ERROR, "hiprune.tenants"):
        watch.look()
    assert f"{file.path}:3: tenants.acme.limits.concurrency" in caplog.text


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666, 0o641])
def test_a_file_that_others_may_read_is_refused_at_the_start(file, mode):
    file.write("tenants: {}\n", mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}, expected nothing for others"):
        TenantsWatch(file.path)
    for good in (0o600, 0o640, 0o440):
        file.write("tenants: {}\n", good)
        TenantsWatch(file.path)


@pytest.mark.parametrize("text", [None, "tenants: ["])
def test_a_broken_or_missing_file_is_refused_at_the_start(file, text):
    if text is not None:
        file.write(text)
    with pytest.raises(ConfigError, match=os.path.basename(file.path)):
        TenantsWatch(file.path)
