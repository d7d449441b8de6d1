"""Claims about who is let in, and for whom."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from hiprune.auth import (
    ANONYMOUS,
    KEY_HEADER,
    PEER_HEADER,
    TENANT_HEADER,
    Arrival,
    Caller,
    Limits,
    Rules,
    Tenant,
    admit,
)
from hiprune.errors import HipruneError, PermissionDenied, Unauthenticated
from hiprune.v1 import pruner_service_pb2 as pb

TOKEN = "a token of sixteen and more"
KEY = "the key of acme"
ACME = Tenant("acme", Limits(concurrency=2))
GUESTS = Tenant("anonymous", Limits(concurrency=1))


class House:
    """Accounts: acme has a key, and callers without one are bounded, if they are served at all."""

    def of_key(self, key):
        return ACME if key == KEY else None

    def named(self, name):
        return GUESTS if name == "anonymous" else None


OPEN = Rules()
TENANTS = Rules(accounts=House())
GUESTED = Rules(accounts=House(), allow_anonymous=True)
INNER = Rules(peer_token=TOKEN, peers_only=True)
BOTH = Rules(accounts=House(), peer_token=TOKEN, peers_only=True)
CERTIFIED = Rules(peers_only=True)

by_key = (KEY_HEADER, f"Bearer {KEY}")
by_token = (PEER_HEADER, TOKEN)
for_acme = (TENANT_HEADER, "acme")


def arrival(*metadata, **kinds) -> Arrival:
    return Arrival(metadata, **kinds)


@pytest.mark.parametrize(
    ("rules", "coming", "caller"),
    [
        (OPEN, arrival(), Caller(ANONYMOUS)),
        (OPEN, arrival(by_key), Caller(ANONYMOUS)),  # a client's habit; nothing here could tell keys
        (TENANTS, arrival(by_key), Caller(ACME)),
        (TENANTS, arrival((KEY_HEADER, f"bearer  {KEY}")), Caller(ACME)),
        (GUESTED, arrival(), Caller(GUESTS)),
        (GUESTED, arrival(by_key), Caller(ACME)),
        (INNER, arrival(by_token), Caller(ANONYMOUS)),
        (INNER, arrival(by_token, for_acme), Caller(Tenant("acme"), first=False)),
        (INNER, arrival(for_acme, unix=True), Caller(Tenant("acme"), first=False)),
        (CERTIFIED, arrival(for_acme, certified=True), Caller(Tenant("acme"), first=False)),
        (BOTH, arrival(by_token, for_acme), Caller(Tenant("acme"), first=False)),
        (BOTH, arrival(by_token, (TENANT_HEADER, "anonymous")), Caller(ANONYMOUS, first=False)),
        (BOTH, arrival(by_key), Caller(ACME)),
        (BOTH, arrival(by_key, unix=True), Caller(ACME)),
        (OPEN, arrival(for_acme, unix=True), Caller(Tenant("acme"), first=False)),
    ],
)
def test_a_caller_is_who_its_key_or_a_trusted_peer_says(rules, coming, caller):
    assert admit(coming, rules) == caller


@pytest.mark.parametrize(
    ("rules", "coming", "kind", "said"),
    [
        (TENANTS, arrival(), Unauthenticated, "no API key"),
        (TENANTS, arrival(unix=True), Unauthenticated, "no API key"),
        (BOTH, arrival(by_token), Unauthenticated, "no API key"),
        (TENANTS, arrival((KEY_HEADER, "Bearer of bad news")), Unauthenticated, "not known"),
        (TENANTS, arrival((KEY_HEADER, KEY)), Unauthenticated, "form `Bearer KEY`"),
        (TENANTS, arrival((KEY_HEADER, f"Basic {KEY}")), Unauthenticated, "form `Bearer KEY`"),
        (TENANTS, arrival(by_key, by_key), Unauthenticated, "comes 2 times"),
        (GUESTED, arrival((KEY_HEADER, "Bearer stale")), Unauthenticated, "not known"),
        (INNER, arrival(), Unauthenticated, "peers are served"),
        (INNER, arrival(by_key), Unauthenticated, "peers are served"),
        (CERTIFIED, arrival(by_token), Unauthenticated, "peers are served"),
        (INNER, arrival((PEER_HEADER, TOKEN + "!")), PermissionDenied, "peer_token"),
        (INNER, arrival((PEER_HEADER, "ümlaut"), unix=True), PermissionDenied, "peer_token"),
        (BOTH, arrival(by_key, for_acme), PermissionDenied, "own peers only"),
        (OPEN, arrival(for_acme), PermissionDenied, "own peers only"),
        (OPEN, arrival(by_token, for_acme), PermissionDenied, "own peers only"),
        (TENANTS, arrival(for_acme), PermissionDenied, "own peers only"),
        (OPEN, arrival((TENANT_HEADER, ""), unix=True), PermissionDenied, "no tenant's name"),
        (OPEN, arrival((TENANT_HEADER, "a\nb"), unix=True), PermissionDenied, "no tenant's name"),
        (OPEN, arrival((TENANT_HEADER, "A" * 65), unix=True), PermissionDenied, "no tenant's name"),
        (OPEN, arrival(for_acme, for_acme, unix=True), Unauthenticated, "comes 2 times"),
    ],
)
def test_others_are_refused_in_words_that_repeat_no_secret(rules, coming, kind, said):
    with pytest.raises(HipruneError, match=said) as refused:
        admit(coming, rules)
    assert type(refused.value) is kind
    assert KEY not in str(refused.value)
    assert TOKEN not in str(refused.value)


def test_nobody_but_a_trusted_peer_ever_names_a_tenant():
    """Every combination of credentials and rules: a name is taken only with a reason to."""
    several = [OPEN, TENANTS, GUESTED, INNER, BOTH, CERTIFIED]
    for rules, key, token, unix, certified in itertools.product(several, (0, 1), (0, 1), (0, 1), (0, 1)):
        metadata = (for_acme, *([by_key] * key), *([by_token] * token))
        trusted = unix or certified or (token and rules.peer_token)
        try:
            caller = admit(Arrival(metadata, unix=bool(unix), certified=bool(certified)), rules)
        except PermissionDenied:
            assert not trusted
        else:
            assert trusted
            assert caller == Caller(Tenant("acme"), first=False)


def test_a_default_policy_fills_in_what_a_request_leaves_unset_and_no_more():
    default = pb.PrunePolicy(method=pb.METHOD_HIPRUNE_PLUS_PLUS, keep_ratio=0.25, alpha=0.2, beta=0.3)
    tenant = dataclasses.replace(ACME, policy=default)
    assert tenant.complete(pb.PrunePolicy()) == default
    asked = pb.PrunePolicy(method=pb.METHOD_HIPRUNE, keep_count=7, alpha=0.0, include_scores=True)
    whole = tenant.complete(asked)
    assert (whole.method, whole.keep_count, whole.alpha, whole.beta) == (pb.METHOD_HIPRUNE, 7, 0.0, 0.3)
    assert whole.WhichOneof("budget") == "keep_count"
    assert whole.include_scores
    assert tenant.policy == default  # a copy is filled in, not the tenant's own
    assert ACME.complete(asked) == asked
