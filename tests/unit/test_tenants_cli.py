"""Claims about `hiprune tenant`: what it prints, what it keeps, and what it leaves alone."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from hiprune.auth import Limits
from hiprune.cli import app
from hiprune.tenants import TenantsWatch
from hiprune.v1 import pruner_service_pb2 as pb


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tenants.yaml"


@pytest.fixture
def tenant(file):
    """Runs `hiprune tenant …` and returns what it prints on standard output."""

    def run(*arguments: str, fails: str | None = None) -> str:
        result = CliRunner().invoke(app, ["tenant", *arguments], env={"HIPRUNE_TENANTS": str(file)})
        if fails is None:
            assert result.exit_code == 0, result.output
        else:
            assert result.exit_code == 1
            assert fails in result.stderr
        return result.stdout.strip()

    return run


def test_a_key_is_printed_once_and_opens_the_account(tenant, file):
    key = tenant("add", "acme")
    assert TenantsWatch(file).of_key(key).name == "acme"
    assert key not in file.read_text()
    assert key not in tenant("list")
    assert key.split("_", 2)[2] not in tenant("list", "--json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_limits_and_the_default_policy_are_kept(tenant, file):
    limits = {"requests-per-minute": 60, "tokens-per-minute": 2000, "concurrency": 4}
    limits |= {"max-image-bytes": 1000, "max-image-pixels": 10**6}
    flags = [text for name, value in limits.items() for text in (f"--{name}", str(value))]
    tenant("add", "acme", *flags, "--method", "hiprune++", "--keep-ratio", "0.25")
    tenant("add", "plain", "--keep-count", "65")
    found = TenantsWatch(file)
    assert found.named("acme").limits == Limits(60, 2000, 4, 1000, 10**6)
    assert found.named("acme").policy == pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.25)
    assert found.named("plain").policy == pb.PrunePolicy(keep_count=65)
    listed = json.loads(tenant("list", "--json"))
    assert listed["acme"]["limits"]["concurrency"] == 4
    assert listed["acme"]["policy"] == {"method": "hiprune++", "keep_ratio": 0.25}


def test_keys_are_changed_one_at_a_time(tenant, file):
    old = tenant("add", "acme", "--concurrency", "2")
    new = tenant("key", "acme")
    both = TenantsWatch(file)
    assert both.of_key(old) == both.of_key(new)
    tenant("remove", "acme", "--key", old.split("_")[1])
    left = TenantsWatch(file)
    assert left.of_key(old) is None
    assert left.of_key(new).limits.concurrency == 2
    tenant("remove", "acme")
    assert TenantsWatch(file).named("acme") is None


def test_callers_without_a_key_can_be_bounded_and_have_none(tenant, file):
    assert tenant("add", "anonymous", "--requests-per-minute", "5") == ""
    assert TenantsWatch(file).named("anonymous").limits.requests_per_minute == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "acme"), "there already"),
        (("add", "ACME"), "String should match"),
        (("add", "other", "--method", "best"), "expected one of none, hiprune"),
        (("add", "other", "--keep-ratio", "2"), "less than or equal to 1"),
        (("add", "other", "--keep-ratio", "1", "--keep-count", "3"), "expected one of them"),
        (("key", "nobody"), "no tenant 'nobody'"),
        (("remove", "nobody"), "no tenant 'nobody'"),
        (("remove", "acme", "--key", "0123456789abcdef"), "has no key"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_changed(tenant, file, arguments, said):
    tenant("add", "acme")
    before = file.read_bytes()
    assert tenant(*arguments, fails=said) == ""  # above all, no key that opens nothing
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_broken_file_is_left_for_a_person_to_mend(tenant, file):
    file.write_text("tenants:\n  acme:\n    limits: {concurrency: 0}\n")
    tenant("add", "other", fails="tenants.yaml:3: tenants.acme.limits.concurrency")
    tenant("list", fails="tenants.yaml:3")
    assert "concurrency: 0" in file.read_text()


def test_a_files_mode_stays_but_for_others(tenant, file):
    file.write_text("tenants: {}\n")
    file.chmod(0o644)
    tenant("add", "acme")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    TenantsWatch(file)


def test_a_link_stays_a_link(tenant, file):
    real = file.with_name("real.yaml")
    real.write_text("tenants: {}\n")
    file.symlink_to(real)
    tenant("add", "acme")
    assert file.is_symlink()
    assert "acme" in real.read_text()


def test_two_who_add_at_once_are_both_there(tenant, file):
    from hiprune.commands import tenants as tenants_cli

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: tenants_cli.add(f"t{n}", file), range(8)))
    assert set(TenantsWatch(file)._tenants.by_name) == {f"t{n}" for n in range(8)}
