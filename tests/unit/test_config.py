"""Settings: where values come from, what a wrong one is told, and that secrets stay secret."""

from __future__ import annotations

import traceback

import pytest
from pydantic import Field, SecretStr, ValidationError

from hiprune.auth import is_private
from hiprune.config import ConfigError, ServiceSettings
from services.encoder.settings import Settings as EncoderSettings
from services.llm.settings import Settings as LlmSettings
from services.pruner.settings import Settings

ALL = [Settings, EncoderSettings, LlmSettings]
SECRET = "correct horse battery staple"


def refusal(argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        Settings.read(argv, environ or {})
    return str(caught.value)


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default():
    environ = {"HIPRUNE_PRUNER_MAX_FRAMES": "7", "HIPRUNE_PRUNER_CACHE": "off"}
    assert Settings.read([], {}).max_frames == 64
    assert Settings.read([], environ).max_frames == 7
    read = Settings.read(["--max-frames=9"], environ)
    assert (read.max_frames, read.cache) == (9, "off")


def test_only_the_environment_that_is_given_is_read(monkeypatch):
    monkeypatch.setenv("HIPRUNE_PRUNER_MAX_FRAMES", "7")
    assert Settings.read([], {}).max_frames == 64


def test_another_services_variables_are_not_read():
    assert Settings.read([], {"HIPRUNE_ENCODER_LISTEN": "x", "HIPRUNE_MAX_FRAMES": "x"}) == Settings()


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        ([], {}, False),
        (["--allow-anonymous"], {}, True),
        ([], {"HIPRUNE_PRUNER_ALLOW_ANONYMOUS": "true"}, True),
        ([], {"HIPRUNE_PRUNER_ALLOW_ANONYMOUS": "0"}, False),
        (["--no-allow-anonymous"], {"HIPRUNE_PRUNER_ALLOW_ANONYMOUS": "1"}, False),
    ],
)
def test_a_switch_can_be_set_and_unset(argv, environ, expected):
    assert Settings.read(argv, environ).allow_anonymous is expected


BAD = [
    ("max_frames", "0", "greater than or equal to 1"),
    ("max_frames", "many", "valid integer"),
    ("max_frames", "", "valid integer"),
    ("drain_ms", "-1", "greater than or equal to 0"),
    ("max_message_bytes", str(2**31), "less than or equal to 2147483647"),
    ("cache", "disk", "memory|redis|off"),
    ("log_level", "loud", "debug|info|warning|error"),
    ("allow_anonymous", "maybe", "boolean"),
    ("listen", "nowhere", "pattern"),
    ("listen", "127.0.0.1:99999", "65535"),
    ("encoder", "http://encoder", "pattern"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_a_bad_value_is_told_its_key_its_value_and_what_was_expected(name, value, expected):
    variable = f"HIPRUNE_PRUNER_{name.upper()}"
    flag = f"--{name.replace('_', '-')}"
    messages = [refusal([], {variable: value})]
    if name != "allow_anonymous":  # a switch takes no value
        messages.append(refusal([f"{flag}={value}"]))
    for message in messages:
        assert message.startswith(f"{name} ({flag}, {variable}): got {value!r}, expected: ")
        assert expected in message


def test_every_bad_value_is_named_at_once():
    message = refusal(["--max-frames=0", "--cache=disk"])
    assert "--max-frames" in message
    assert "--cache" in message


def test_an_unknown_flag_ends_the_process_with_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        Settings.read(["--max-framez=3"], {})
    assert caught.value.code == 2
    assert "--max-framez" in capsys.readouterr().err


class Guarded(ServiceSettings):
    """A service with a secret that can be wrong."""

    token: SecretStr = Field(SecretStr(""), description="a secret", min_length=40)


@pytest.mark.parametrize(
    ("kind", "argv"),
    [
        (Settings, [f"--cache-secret={SECRET}", "--cache=redis", "--max-frames=0"]),
        (Settings, [f"--cache-secret={SECRET[:15]}", "--cache=redis"]),
        (Settings, [f"--redis-url=redis://:{SECRET}@h/0", "--listen=0.0.0.0:1"]),
        (Guarded, [f"--token={SECRET}"]),
    ],
)
def test_a_secret_is_in_no_message_and_in_no_traceback(kind, argv):
    with pytest.raises(ConfigError) as caught:
        kind.read(argv, {})
    assert SECRET[:15] not in str(caught.value)
    assert SECRET[:15] not in "".join(traceback.format_exception(caught.value))


def test_a_secret_is_in_no_repr_and_no_dump():
    read = Settings.read([f"--cache-secret={SECRET}", f"--redis-url=redis://:{SECRET}@h/0"], {})
    assert read.cache_secret.get_secret_value() == SECRET
    for shown in (repr(read), str(read), str(read.model_dump()), read.model_dump_json()):
        assert SECRET not in shown


def test_a_default_deadline_above_the_longest_is_refused():
    assert "at most max_deadline_ms, which is 5000" in refusal(["--max-deadline-ms=5000"])
    assert Settings.read(["--max-deadline-ms=60000"], {}).default_deadline_ms == 60_000


def test_redis_without_a_secret_is_refused():
    assert "at least 16" in refusal(["--cache=redis"])
    assert Settings.read(["--cache=redis", f"--cache-secret={SECRET}"], {}).cache == "redis"


def test_an_abstract_socket_which_anybody_may_open_is_refused():
    with pytest.raises(ConfigError, match="got 'unix-abstract:hiprune:1', expected: HOST:PORT or unix:PATH"):
        Settings.read(["--listen", "unix-abstract:hiprune:1"], {})


def test_help_says_where_a_secret_is_better_kept(capsys):
    with pytest.raises(SystemExit):
        Settings.read(["--help"], {})
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("a flag is seen by every user of the machine") == 4


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.service)
def test_strangers_are_served_only_by_consent(kind):
    for listen in ("0.0.0.0:50051", "[::]:50051", "10.1.2.3:50051", "encoder.internal:50051"):
        with pytest.raises(ConfigError, match=r"listen is .*reachable from other machines.*allow_anonymous"):
            kind.read([f"--listen={listen}"], {})
        assert kind.read([f"--listen={listen}", "--allow-anonymous"], {}).listen == listen
    with pytest.raises(ConfigError, match=r"listen_also is '0\.0\.0\.0:1', reachable"):
        kind.read(["--listen=127.0.0.1:0", "--listen-also=0.0.0.0:1"], {})
    for listen in ("127.0.0.1:0", "[::1]:50051", "localhost:50051", "unix:/run/hiprune.sock"):
        assert kind.read([f"--listen={listen}"], {}).listen == listen


def test_strangers_are_not_let_in_by_a_second_address():
    assert Settings.read(["--listen-also=127.0.0.1:1"], {}).listen_also == "127.0.0.1:1"
    assert "'0.0.0.0:1', reachable" in refusal(["--listen-also=0.0.0.0:1"])
    assert "a port up to 65535" in refusal(["--listen-also=127.0.0.1:65536"])
    assert "HOST:PORT" in refusal(["--listen-also=unix-abstract:x:1"])


@pytest.mark.parametrize(
    ("listen", "private"),
    [
        ("unix:/run/a.sock", True),
        ("unix-abstract:name", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.0.1:1", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        ("1", False),
        ("", False),
    ],
)
def test_private_is_a_unix_socket_or_a_loopback_address(listen, private):
    assert is_private(listen) is private


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.service)
def test_help_lists_every_setting_with_its_variable_and_default(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # or a long folder is broken over lines
    with pytest.raises(SystemExit) as caught:
        kind.read(["--help"], {})
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in kind.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description
        default = str(field.get_default()) or "empty"
        assert f"[{kind.env_prefix}{name.upper()}; default: {default}]" in shown


def test_help_survives_a_percent_sign_and_shows_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")

    class Odd(ServiceSettings):
        """Odd."""

        folder: str = Field("/data/100%/x", description="a folder, 50 % of it")
        token: SecretStr = Field(SecretStr(SECRET), description="a secret")

    with pytest.raises(SystemExit):
        Odd.read(["--help"], {})
    shown = capsys.readouterr().out
    assert "/data/100%/x" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.service)
def test_every_setting_is_described_bounded_and_frozen(kind):
    read = kind()
    for name, field in kind.model_fields.items():
        assert field.description, name
        if field.annotation is int:
            assert field.metadata, f"{name} has no bounds"
    with pytest.raises(ValidationError):
        read.listen = "0.0.0.0:1"
