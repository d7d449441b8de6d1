"""`hiprune cache`: counts and forgets what one tenant has in a real Redis, and tells no secret."""

from __future__ import annotations

import asyncio
import json

import pytest
import redis
from typer.testing import CliRunner

from hiprune.cli import app
from hiprune.commands import cache as cache_cli
from services.pruner.cache import TokenCache
from services.pruner.redis_store import RedisStore
from tests import redis_servers
from tests.unit.test_cache import DIGEST, MODEL, PLAIN, image, pruner_service_pb2

SECRET = "a secret that the pruners share"


@pytest.fixture
def filled(start_redis):
    """A Redis in which alice has two encoded images and a pruned one, and bob an encoded one; its URL."""
    url, _ = start_redis()
    asyncio.run(fill(url))
    return url


async def fill(url: str) -> None:
    store = RedisStore(url, ttl_s=60, timeout_s=5)
    cache = TokenCache(store, secret=SECRET.encode(), model=MODEL, max_value_bytes=10_000_000)
    alice, bob = cache.keys("alice"), cache.keys("bob")
    await cache.put_encoded(alice, DIGEST, image(size=3_000_000))
    await cache.put_encoded(alice, bytes(32), image(size=1000))
    cache.put_pruned(alice, DIGEST, PLAIN, "", pruner_service_pb2.PrunedMedia(vision_digest="v" * 100))
    await cache.put_encoded(bob, DIGEST, image(size=1000))
    assert await store.claim(alice.claim(DIGEST, {9}, aligned=True), b"token", 60)
    await cache.close()


def run(url: str, *arguments: str, secret: str = SECRET):
    environ = {"HIPRUNE_PRUNER_REDIS_URL": url, "HIPRUNE_PRUNER_CACHE_SECRET": secret}
    return CliRunner().invoke(app, ["cache", *arguments], env=environ)


def said(url: str, *arguments: str, **options: str):
    result = run(url, *arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_stats_count_a_tenants_entries_and_bytes_or_everybodys(filled):
    found = said(filled, "stats", "--tenant", "alice")
    assert found["tenant"] == "alice"
    assert (found["encoded"]["entries"], found["pruned"]["entries"], found["entries"]) == (2, 1, 3)
    assert 3_001_000 < found["encoded"]["bytes"] < 3_002_000
    assert found["bytes"] == found["encoded"]["bytes"] + found["pruned"]["bytes"]
    everybody = said(filled, "stats")
    assert (everybody["tenants"], everybody["entries"]) == (2, 4)
    text = run(filled, "stats", "--tenant", "alice").stdout
    assert "alice: 2 encoded, 1 pruned, 2.9 MiB" in text


def test_purging_one_tenant_leaves_the_other(filled):
    with redis.Redis.from_url(filled) as client:
        client.set("somebody else's", "key")
        before = said(filled, "stats", "--tenant", "bob")
        purged = said(filled, "purge", "--tenant", "alice")["purged"]
        assert (purged["encoded"]["entries"], purged["pruned"]["entries"]) == (2, 1)
        assert purged["bytes"] > 3_001_000
        assert said(filled, "stats", "--tenant", "alice")["entries"] == 0
        assert said(filled, "stats", "--tenant", "bob") == before
        left = {key.rpartition(b"}")[2][:3] for key in client.scan_iter()}
        assert left == {b"som", b":e:", b":us", b":si"}  # bob's entry and its books alone
        assert said(filled, "purge", "--tenant", "alice")["purged"]["entries"] == 0


def test_what_is_stored_after_a_purge_is_counted_from_nothing(filled):
    said(filled, "purge", "--tenant", "alice")
    asyncio.run(fill(filled))
    assert said(filled, "stats", "--tenant", "alice")["entries"] == 3


def test_more_than_one_batch_is_counted_and_forgotten(filled, monkeypatch):
    monkeypatch.setattr(cache_cli, "_BATCH", 2)
    assert said(filled, "stats", "--tenant", "alice")["entries"] == 3
    assert said(filled, "purge", "--tenant", "alice")["purged"]["entries"] == 3
    assert said(filled, "stats")["entries"] == 1


def test_another_secret_or_name_finds_nothing_and_says_what_to_check(filled):
    for arguments, secret in ((["--tenant", "Alice"], SECRET), (["--tenant", "alice"], SECRET + "x")):
        result = run(filled, "stats", *arguments, secret=secret)
        assert ": 0 encoded, 0 pruned" in result.stdout
        assert "check both" in result.output
    assert said(filled, "stats", "--tenant", "alice")["entries"] == 3


def test_no_output_holds_a_key_a_secret_or_a_password(filled, tmp_path):
    outputs = [
        run(filled, *arguments).output
        for arguments in (
            ["stats"],
            ["stats", "--tenant", "alice"],
            ["purge", "--tenant", "alice"],
            ["--help"],
        )
    ]
    gone = f"unix://:sesame@{tmp_path}/nobody.sock"
    wrong = ["redis://:sesa:me#@host:6379", "redis://:sesame@h?what=1", "redis+cluster://:sesame@", gone]
    for url in wrong:
        result = run(url, "stats", "--tenant", "alice")
        assert result.exit_code != 0
        assert "Traceback" not in result.output
        outputs.append(result.output)
    for text in outputs:
        assert "hiprune:v1" not in text
        assert SECRET not in text
        assert "sesa" not in text


def test_a_secret_that_is_none_and_a_missing_tenant_are_refused(filled):
    short = run(filled, "stats", "--tenant", "alice", secret="short")
    assert short.exit_code == 2
    assert "at least 16" in short.output
    assert run(filled, "purge").exit_code == 2
    assert said(filled, "stats", "--tenant", "alice")["entries"] == 3


def test_a_cluster_is_counted_and_purged_too(tmp_path):
    with redis_servers.cluster(tmp_path) as ports:
        url = f"redis+cluster://127.0.0.1:{ports[1]}"
        asyncio.run(fill(url))
        assert said(url, "stats", "--tenant", "alice")["entries"] == 3
        assert said(url, "stats")["entries"] == 4
        assert said(url, "purge", "--tenant", "alice")["purged"]["entries"] == 3
        assert said(url, "stats")["entries"] == 1
