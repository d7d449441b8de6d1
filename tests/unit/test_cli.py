"""The `hiprune` command where no service is needed: what it refuses, how it ends, completion, the doctor."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
import typer
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from PIL import Image
from typer.testing import CliRunner

from hiprune import checks, load, reach, sheet
from hiprune.cli import app
from hiprune.commands import options, up
from hiprune.policies import METHODS
from hiprune.stack import free_port, is_free
from hiprune.v1 import pruner_service_pb2 as pb
from tests.certificates import Authority
from tests.stacks import SAMPLES, picture

PICTURE = str(SAMPLES / "scene00.png")
ROOT = Path(__file__).resolve().parents[2]
NOBODY = {
    "HIPRUNE_ADDRESS": "127.0.0.1:1",
    "HIPRUNE_PRUNER_ADDRESS": "127.0.0.1:1",
    "HIPRUNE_ENCODER_ADDRESS": "127.0.0.1:1",
    "HIPRUNE_GATEWAY_ADDRESS": "127.0.0.1:1",
}


def run(*arguments: str, **environ: str):
    return CliRunner().invoke(app, list(arguments), env={**NOBODY, **environ})


# --- how it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", PICTURE, "?", "--method", "magic"], ["--method", "magic", "hiprune++"]),
        (["ask", PICTURE, "?", "--keep", "some"], ["--keep", "some", "33%"]),
        (["ask", PICTURE, "?", "--overlay", "kept.txt"], ["--overlay", ".png"]),
        (["ask", PICTURE, "?", "--address", ""], ["--address", "HOST:PORT"]),
        (["ask", PICTURE, "?", "--tls-cert", "x"], ["--tls-key"]),
        (["prune", PICTURE, PICTURE, "--overlay", "x.png"], ["--overlay", "2 images"]),
        (["prune", PICTURE, "--pruner", ""], ["--pruner", "HOST:PORT"]),
        (["compare", PICTURE, "--methods", "hiprune,magic"], ["--methods", "magic"]),
        (["compare", PICTURE, "--keeps", ","], ["--keeps", "empty"]),
        (["bench", PICTURE, "--question", "?", "--against", "magic"], ["--against", "magic"]),
        (["bench", PICTURE, "--question", "?", "--against", "hiprune"], ["--against", "itself"]),
        (["bench", PICTURE], ["--question"]),
        (["bench", "README.md", "--question", "?", "--fresh"], ["IMAGES", "README.md", "no picture"]),
        (["nothing"], ["nothing"]),
    ],
)
def test_a_wrong_command_line_ends_with_2_in_words_or_as_json(arguments, words):
    said = run(*arguments)
    assert said.exit_code == 2
    plain = re.sub(r"[│╭╰╮╯─\s]+", " ", said.stderr)
    assert all(word in plain for word in words), said.stderr
    said = run(*arguments, "--json")
    assert (said.exit_code, said.stdout) == (2, "")
    error = json.loads(said.stderr)["error"]
    assert error["reason"] == "USAGE"
    assert all(word in error["message"] for word in words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", PICTURE, "?"],
        ["prune", PICTURE],
        ["compare", PICTURE],
        ["compare", PICTURE, "--question", "?"],
    ],
    ids=" ".join,
)
def test_a_service_that_is_away_ends_it_with_1_in_words_or_as_json(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run(*arguments)
    assert said.exit_code == 1
    assert re.search(r"error: the (llm|pruner) cannot be reached \(UNAVAILABLE", said.stderr)
    said = run(*arguments, "--json")
    assert (said.exit_code, said.stdout) == (1, "")
    error = json.loads(said.stderr)["error"]
    assert error["code"] == "UNAVAILABLE"
    assert set(error) == {"message", "reason", "field", "code", "retry_after_s"}
    assert not list(tmp_path.iterdir())


def test_the_other_commands_fail_as_json_too(tmp_path):
    file = str(tmp_path / "tenants.yaml")
    made = run("tenant", "add", "acme", "--file", file, "--json")
    assert set(json.loads(made.stdout)) == {"tenant", "key"}
    for arguments, reason in (
        (("tenant", "add", "acme", "--file", file), "TENANTS_FILE"),
        (("tenant", "key", "nobody", "--file", file), "TENANTS_FILE"),
        (("cache", "stats", "--redis-url", "redis://:secret@127.0.0.1:1"), "REDIS_UNREACHABLE"),
        (("evaluate", "--model", file), "MODEL"),
        (("suggest-layer", PICTURE, PICTURE, "--model", file), "MODEL"),
        (("export-lm", file, str(tmp_path / "lm")), "EXPORT_FAILED"),
    ):
        said = run(*arguments, "--json")
        assert (said.exit_code, said.stdout) == (1, "")
        error = json.loads(said.stderr)["error"]
        assert error["reason"] == reason
        assert "secret" not in error["message"]


def test_a_key_on_its_way_in_the_clear_is_warned_of():
    asked = ["ask", PICTURE, "?", "--address", "192.0.2.1:1", "--timeout", "0.01"]
    assert "unencrypted" in run(*asked, HIPRUNE_KEY="secret").stderr
    assert "unencrypted" not in run(*asked).stderr
    said = run(*asked, "--json", HIPRUNE_KEY="secret")
    assert set(json.loads(said.stderr)) == {"error"}


@pytest.mark.parametrize(
    "arguments",
    [("ask", PICTURE, "?", "--overlay"), ("compare", PICTURE, "--out"), ("prune", PICTURE, "--report")],
)
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_asked(arguments, tmp_path):
    folder = tmp_path / "kept.png"
    folder.mkdir()
    said = run(*arguments, str(folder), "--json")
    assert (said.exit_code, said.stdout) == (2, "")
    assert "is a folder" in json.loads(said.stderr)["error"]["message"]


def test_a_file_that_cannot_be_written_in_the_end_is_an_error_in_words_or_as_json(tmp_path, capsys):
    for as_json in (True, False):
        with pytest.raises(typer.Exit) as ended, options.writing(tmp_path, as_json=as_json):
            tmp_path.write_text("no file")
        assert ended.value.exit_code == 1
    first, second = capsys.readouterr().err.splitlines()
    error = json.loads(first)["error"]
    assert (error["reason"], error["message"]) == ("NOT_WRITTEN", f"{tmp_path}: Is a directory")
    assert second.startswith("error: ")


@pytest.mark.parametrize("names", [("a/cat.png", "b/cat.png"), ("cat.png", "cat.jpg", "cat.png.webp")])
def test_pictures_whose_results_would_have_one_name_are_refused_before_anything_is_written(names, tmp_path):
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture("scene00.png"))
    said = run("prune", *map(str, files), "--out", str(tmp_path / "kept"), "--json")
    assert said.exit_code == 2
    assert "cat.png.kept.png" in json.loads(said.stderr)["error"]["message"]
    assert not (tmp_path / "kept").exists()


# --- completion --------------------------------------------------------------------------------------------


@pytest.fixture
def program():
    """The installed command: completion goes by its name."""
    path = Path(sys.executable).with_name("hiprune")
    assert path.exists()
    return str(path)


def test_the_shell_completes_commands_and_methods(program):
    def complete(words: str) -> list[str]:
        environ = {"_HIPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environ["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        done = subprocess.run(
            [program], env={**os.environ, **environ}, capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    assert "compare" in complete("hiprune com")
    assert set(complete("hiprune ask --method ")) == set(METHODS)
    assert set(complete("hiprune prune --method hip")) == {name for name in METHODS if name.startswith("hip")}
    assert "1/3" in complete("hiprune prune --keep 1/")


def test_the_shells_own_script_is_shown_and_installed(program, tmp_path):
    environ = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}

    def hiprune(option: str) -> str:
        command = [program, option, "bash"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = hiprune("--show-completion")
    assert "_HIPRUNE_COMPLETE=complete_bash" in shown
    hiprune("--install-completion")
    written = [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert any(shown.strip() in text for text in written)


# --- the doctor --------------------------------------------------------------------------------------------


def findings(**environ: str) -> tuple[dict[str, list[checks.Finding]], int]:
    """What the doctor finds, by check, and its exit code."""
    said = run("doctor", "--json", **environ)
    content = json.loads(said.stdout)
    assert content["ok"] is (said.exit_code == 0)
    found: dict[str, list[checks.Finding]] = {}
    for each in content["findings"]:
        assert set(each) == {"check", "status", "message", "advice"}
        assert each["status"] in {"ok", "warning", "problem"}
        assert each["advice"] or each["status"] == "ok"
        found.setdefault(each["check"], []).append(checks.Finding(**each))
    return found, said.exit_code


def test_the_doctor_says_who_is_away_and_that_that_is_a_problem_where_they_were_named():
    found, code = findings()
    assert code == 1
    for service in ("llm", "pruner", "encoder", "gateway"):
        assert found[service][0].status == "problem"
        assert "127.0.0.1:1" in found[service][0].message
    assert found["python"][0].status == "ok"
    (packages,) = found["packages"]
    assert f"grpcio {importlib.metadata.version('grpcio')}" in packages.message


def test_the_doctor_names_bad_and_unknown_settings_and_shows_no_secret():
    secret = "a redis password"
    found, _ = findings(
        HIPRUNE_ENCODER_MAX_FRAMES="many",
        HIPRUNE_LLM_MAX_QUEU="3",
        HIPRUNE_PRUNER_CACHE="redis",
        HIPRUNE_PRUNER_CACHE_SECRET="short",
        HIPRUNE_PRUNER_REDIS_URL=f"redis://:{secret}@127.0.0.1:1/0",
    )
    said = {each.status: [] for group in found.values() for each in group}
    for each in found["settings"]:
        said[each.status].append(f"{each.message} {each.advice}")
    assert any("max_frames" in each and "'many'" in each for each in said["problem"])
    assert any("cache_secret" in each for each in said["problem"])
    assert any(
        "MAX_QUEU is no setting did you mean HIPRUNE_LLM_MAX_QUEUE" in each for each in said["warning"]
    )
    assert found["redis (cache)"][0].status == "problem"
    assert secret not in str(found)


def test_the_doctor_knows_every_variable_of_the_deployment():
    named: set[str] = set()
    for path in [*ROOT.glob("docker-compose*.yml"), *(ROOT / "deploy").rglob("*.y*ml"), ROOT / "Makefile"]:
        named |= set(re.findall(r"\bHIPRUNE_[A-Z_]+[A-Z]\b", path.read_text("utf-8")))
    assert len(named) > 20
    named.remove("HIPRUNE_PLUS_PLUS")  # of METHOD_HIPRUNE_PLUS_PLUS
    found = checks.check_settings(dict.fromkeys(named, ""))
    assert not [each.message for each in found if "is no setting" in each.message]


def test_no_setting_of_a_service_has_the_name_of_a_variable_of_the_commands():
    from tools.settings_tables import readmes

    names = {f"{kind.env_prefix}{name.upper()}" for _, kind in readmes() for name in kind.model_fields}
    assert not names & checks.CLIENT_VARIABLES


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"), "ok", "allkeys-lru"),
        (("--maxmemory", "64mb"), "problem", "noeviction"),
        ((), "warning", "no maxmemory"),
    ],
)
def test_the_doctor_looks_at_the_redis_that_is_set(start_redis, options, status, words):
    url, _ = start_redis(*options)
    found, _ = findings(
        HIPRUNE_PRUNER_CACHE="redis", HIPRUNE_PRUNER_REDIS_URL=url, HIPRUNE_PRUNER_CACHE_SECRET="s" * 16
    )
    (redis,) = found["redis (cache)"]
    assert redis.status == status
    assert words in redis.message
    assert found["clock"][0].status == "ok"


def test_the_doctor_reads_the_certificates(tmp_path):
    bad = tmp_path / "ca.crt"
    bad.write_text("no certificate")
    found, code = findings(HIPRUNE_ENCODER_TLS_CA=str(bad))
    assert code == 1
    assert found["tls encoder"][0].status == "problem"
    assert str(bad) in found["tls encoder"][0].message


@pytest.mark.parametrize("by", ["variable", "option"])
def test_the_doctor_looks_at_everything_also_where_no_certificate_can_be_read(by, tmp_path):
    missing = str(tmp_path / "missing.pem")
    given = {"HIPRUNE_TLS_CA": missing} if by == "variable" else {}
    flags = ("--tls-ca", missing) if by == "option" else ()
    said = run("doctor", "--json", *flags, **given)
    assert said.exit_code == 1
    found = {each["check"]: each for each in json.loads(said.stdout)["findings"]}
    assert found["tls client"]["status"] == "problem"
    assert missing in found["tls client"]["message"]
    assert {"python", "llm", "gateway", "redis"} <= set(found)


@pytest.mark.parametrize("key", ["clé", "two\nlines"])
def test_the_doctor_finds_a_key_that_no_header_can_hold(key):
    server = grpc.server(ThreadPoolExecutor(1))
    ready = health.HealthServicer()
    ready.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(ready, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        found, code = findings(HIPRUNE_ADDRESS=address, HIPRUNE_KEY=key)
    finally:
        server.stop(None).wait()
    assert code == 1
    assert found["key"][0].status == "problem"
    assert address in found["llm"][0].message
    assert key not in str(found)


def test_the_doctor_says_until_when_certificates_hold(tmp_path):
    certificate, key, authority = Authority("ours").write(tmp_path)
    environ = {
        "HIPRUNE_LLM_TLS_CERT": certificate,
        "HIPRUNE_LLM_TLS_KEY": key,
        "HIPRUNE_LLM_TLS_CA": authority,
    }
    found = list(checks.check_tls(environ))
    assert [each.status for each in found] == ["warning", "warning"]  # a day is left
    assert all("holds until" in each.message and "renew" in each.advice for each in found)
    (odd,) = checks.check_tls({**environ, "HIPRUNE_LLM_TLS_KEY": authority})
    assert odd.status == "problem"
    (half,) = checks.check_tls({"HIPRUNE_TLS_KEY": key})
    assert (half.check, half.status) == ("tls client", "problem")
    assert "HIPRUNE_TLS_CERT is empty" in half.message


@pytest.mark.parametrize(
    ("scheme", "status", "expected"),
    [("", 200, "ok"), ("http://", 200, "ok"), ("", 503, "problem"), ("https://", 200, "problem")],
)
def test_the_doctor_asks_the_gateway_over_http_and_compares_clocks(scheme, status, expected):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *words):
            pass

        def date_time_string(self, timestamp=None):
            return super().date_time_string(time.time() - 3600)

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"{scheme}127.0.0.1:{server.server_port}"
        gateway, *clock = reach.check_gateway(reach.Place("gateway", address, expected=True))
    assert gateway.status == expected
    assert [(each.check, each.status) for each in clock] == ([] if "s:" in scheme else [("clock", "warning")])


# --- up ----------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_gives_way_to_a_free_one_and_a_line_says_so(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        found = up.ports({"pruner": port})
    assert found["pruner"] != port
    said = capsys.readouterr().err
    assert f"port {port} is taken" in said
    assert f"HIPRUNE_PRUNER_ADDRESS=127.0.0.1:{found['pruner']}" in said
    free = free_port()
    assert up.ports({"pruner": free}) == {"pruner": free}


def test_encoder_and_pruner_never_get_a_port_of_the_llms_the_gateways_or_each_others():
    llm, gateway, one = free_port(), free_port(), free_port()
    found = up.ports({"pruner": llm, "encoder": gateway}, {llm, gateway})
    assert not {llm, gateway} & set(found.values())
    found = up.ports({"pruner": one, "encoder": one})
    assert found["pruner"] == one != found["encoder"]
    said = run("up", "--port", str(llm), "--http-port", str(llm))
    assert said.exit_code == 2
    assert "--http-port" in said.stderr


def test_the_ports_of_encoder_and_pruner_are_no_way_around_the_llms_keys():
    given = up.tenants_for_all({"HIPRUNE_LLM_TENANTS": "a.yaml", "HIPRUNE_ENCODER_TENANTS": "b.yaml"})
    assert given == {"HIPRUNE_PRUNER_TENANTS": "a.yaml"}
    assert up.tenants_for_all({}) == {}


# --- load and sheets ---------------------------------------------------------------------------------------


def test_a_percentile_is_the_nearest_rank():
    values = [float(n) for n in range(1, 101)]
    assert [load.percentile(values, share) for share in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert load.percentile([3.0], 99) == 3.0


def test_a_picture_with_a_comment_is_the_same_picture_in_other_bytes(tmp_path):
    import io

    png = load.as_png(picture("scene00.png"))
    changed = load.with_comment(png, "x")
    assert changed != png
    with Image.open(io.BytesIO(png)) as one, Image.open(io.BytesIO(changed)) as other:
        assert one.tobytes() == other.tobytes()
        assert other.text["Comment"] == "x"


def test_a_sheet_has_a_picture_in_every_cell_and_fits_what_is_long():
    view = pb.Selection(grid_height=3, grid_width=4, kept_indices=[0, 5], kinds=[1, 3])
    tile = sheet.Tile(view, 12, 2, "a long answer " * 40, agrees=False)
    cells = {(method, keep): tile for method in ("one", "two", "three") for keep in ("1/2", "65")}
    words = {"title": "title " * 100, "question": "?", "whole": tile}
    drawn = sheet.draw_sheet(
        picture("scene00.png"), cells, methods=["one", "two", "three"], keeps=["1/2", "65"], **words
    )
    small = sheet.draw_sheet(
        picture("scene00.png"), {("one", "65"): tile}, methods=["one"], keeps=["65"], **words
    )
    assert drawn.width > small.width
    assert drawn.height > small.height
    anchor = drawn.getcolors(2**24)
    assert anchor is not None
    assert (0xD5, 0x5E, 0x00) in {colour for _, colour in anchor}
