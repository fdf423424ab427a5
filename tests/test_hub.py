"""The Hub client against a server that speaks the Hub's routes: huggingface_hub itself asks, nothing is replaced."""

import email.utils
import gzip
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from fastapi.testclient import TestClient
from hub_server import STRANGER, TOKEN, HubServer, Sparse
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled
from vramplan.catalog.models import MODELS
from vramplan.errors import PlanError
from vramplan.hub import checkpoint_weights, client, config_file, model_search, refusals
from vramplan.server.app import create_app
from vramplan.usecases import plan

ROOT = Path(__file__).parents[1]
IDS = {model.id for model in MODELS}
ID = "acme/Llama-3.1-8B-tuned"
CONFIG = {"model_type": "llama", "hidden_size": 64}
FILES = {"config.json": json.dumps(CONFIG).encode(), "README.md": b"# tuned"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No settings of the machine's user; short pauses; and huggingface_hub as it is after the dry run's import."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(client, "PAUSE", 0.02)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(client, "READ", 0.1)


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def fetch(hub, tmp_path):
    def fetch(name=ID, revision=None, token=None):
        return config_file.fetch_config(
            name, revision, endpoint=hub.endpoint, token=token, cache_dir=str(tmp_path / "cache")
        )

    return fetch


@pytest.fixture
def plan_job(hub, tmp_path):
    def plan_job(name=ID, revision=None, token=None):
        return checkpoint_weights.weights_of(
            name, revision, endpoint=hub.endpoint, token=token, cache_dir=str(tmp_path / "cache")
        )

    return plan_job


def refused(call, *args, **kwargs) -> PlanError:
    """The error, which is one sentence and one advice and holds no trace and no token."""
    with pytest.raises(PlanError) as told:
        call(*args, **kwargs)
    error = told.value
    for text in (error.message, error.hint):
        assert text.strip() and "\n" not in text and len(text) < 500, text
        assert "Traceback" not in text and "hf_" not in text.replace("hf_xet", "")
    assert error.field in ("model", "revision")
    return error


def took(call) -> tuple[float, object]:
    begin = time.monotonic()
    result = call()
    return time.monotonic() - begin, result


def blobs(tmp_path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.parent.name == "blobs"]


# Where it comes from


def test_a_config_is_pinned_to_the_commit_that_the_hub_names(hub, fetch):
    repo = hub.add(ID, FILES)
    assert fetch() == (CONFIG, {"kind": "hub", "id": ID, "commit": repo.commit})
    assert [(one.method, one.status) for one in hub.log] == [("HEAD", 307), ("HEAD", 200), ("GET", 200)]


def test_a_branch_moves_and_its_cached_commit_stays(hub, fetch):
    repo = hub.add(ID, FILES)
    _, first = fetch()
    repo.refs["main"] = "b" * 40
    repo.files = {"config.json": b'{"model_type": "gpt2"}'}
    assert fetch() == ({"model_type": "gpt2"}, {"kind": "hub", "id": ID, "commit": "b" * 40})
    asked = len(hub.log)
    assert fetch(revision=first["commit"]) == (CONFIG, first)
    assert len(hub.log) == asked, "a cached commit needs no look-up"


def test_a_tag_is_looked_up(hub, fetch):
    hub.add(ID, FILES, refs={"v1.0": "c" * 40})
    assert fetch(revision="v1.0")[1]["commit"] == "c" * 40


def test_an_unchanged_file_is_not_sent_twice(hub, fetch):
    hub.add(ID, FILES)
    fetch()
    fetch()
    assert len(hub.asked("HEAD", "resolve-cache")) == 2 and len(hub.asked("GET")) == 1


def test_a_file_on_the_cdn_is_read_without_the_token(hub, fetch):
    repo = hub.add(ID, FILES, lfs=["config.json"], private=True)
    assert fetch(token=TOKEN) == (CONFIG, {"kind": "hub", "id": ID, "commit": repo.commit})
    (cdn,) = hub.asked("GET", "/cdn/")
    assert cdn.status == 200 and "authorization" not in cdn.headers
    assert all(one.headers["authorization"] == f"Bearer {TOKEN}" for one in hub.asked(part="resolve"))


def test_a_renamed_repository_is_followed(hub, fetch):
    hub.add(ID, FILES)
    hub.renamed["oldname"] = ID
    assert fetch("oldname")[0] == CONFIG


def test_nothing_but_the_file_is_asked(hub, fetch):
    """huggingface_hub's registry of agents and its telemetry would be requests too."""
    hub.add(ID, FILES)
    fetch()
    assert all("config.json" in one.path for one in hub.log)
    assert constants.HF_HUB_DISABLE_TELEMETRY and constants.HF_HUB_DISABLE_XET
    assert are_progress_bars_disabled("huggingface_hub.http_get")


def test_a_file_that_a_repository_need_not_have(hub, fetch, tmp_path, monkeypatch):
    """It is read at the commit of the config; that there is none is no error, that nobody answers is one."""
    repo = hub.add(ID, {**FILES, "preprocessor_config.json": b'{"max_pixels": 7}'})

    def optional(file):
        where = {"endpoint": hub.endpoint, "cache_dir": str(tmp_path / "cache")}
        return config_file.fetch_optional(ID, file, repo.commit, **where)

    assert optional("preprocessor_config.json") == {"max_pixels": 7}
    assert optional("processor_config.json") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert optional("preprocessor_config.json") == {"max_pixels": 7} and optional("video.json") is None
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.fault("HEAD", "video.json", status=503, times=9)
    assert "503 Service Unavailable" in refused(optional, "video.json").message


def test_many_at_once(hub, tmp_path):
    for i in range(12):
        hub.add(f"acme/m{i}", {"config.json": json.dumps({"i": i}).encode()})
    hub.fault("GET", "m3/", status=503, times=1)

    def one(i):
        return config_file.fetch_config(f"acme/m{i}", endpoint=hub.endpoint, cache_dir=str(tmp_path))[0]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == [{"i": i} for i in range(12)]


# Who may read it


def test_gated(hub, fetch):
    hub.add(ID, FILES, gated=True)
    for token, status in ((None, 401), (STRANGER, 403)):
        error = refused(fetch, token=token)
        assert "gated" in error.message and ID in error.message
        assert "accept its licence" in error.hint and "HF_TOKEN" in error.hint and f"{hub.endpoint}/{ID}" in error.hint
        assert hub.log[-1].status == status
    assert fetch(token=TOKEN)[0] == CONFIG


@pytest.mark.parametrize("private", [True, False])
def test_private_and_unknown_are_told_alike(hub, fetch, private):
    """The Hub does not say which; 401 to nobody, 404 to somebody."""
    if private:
        hub.add(ID, FILES, private=True)
    for token, status in ((None, 401), (STRANGER, 404)):
        error = refused(fetch, token=token)
        assert f"has no model {ID}" in error.message and "private" in error.message
        assert "HF_TOKEN" in error.hint and "meta-llama/Llama-3.1-8B" in error.hint
        assert hub.log[-1].status == status


def test_a_token_that_the_hub_does_not_know(hub, fetch):
    hub.add(ID, FILES)
    error = refused(fetch, token="hf_expired")
    assert "does not accept your token" in error.message and "HF_TOKEN" in error.hint


def test_a_disabled_repository(hub, fetch):
    hub.add(ID, FILES, disabled=True)
    assert "disabled" in refused(fetch).message


def test_a_plain_403(hub, fetch):
    hub.add(ID, FILES)
    hub.fault("HEAD", "config.json", status=403)
    assert "denies access" in refused(fetch).message


def test_unknown_revision(hub, fetch):
    hub.add(ID, FILES)
    error = refused(fetch, revision="nope")
    assert error.message == f"{ID} has no revision nope" and error.field == "revision"


@pytest.mark.parametrize("revision", ["../../../../etc/passwd", "/etc/passwd", "a b", "a\0b", "-x", "x" * 300])
def test_a_revision_that_is_a_path_is_not_looked_up(hub, fetch, revision):
    hub.add(ID, FILES)
    assert refused(fetch, revision=revision).field == "revision"
    assert hub.log == []


def test_a_repository_without_config(hub, fetch):
    hub.add(ID, {"README.md": b""})
    assert "has no config.json" in refused(fetch).message


@pytest.mark.parametrize(
    "name", ["a/b/c", "../x", "a--b", "-a", "has space", "x" * 97, "./config.json", "a\nb", "name.git", "é"]
)
def test_what_is_no_id_is_not_looked_up(hub, fetch, name):
    error = refused(fetch, name)
    assert "neither a file here nor an id of the Hub" in error.message
    assert any(id in error.hint for id in IDS)
    assert hub.log == []


# Bad days


def test_a_short_rate_limit_is_waited_for(hub, fetch):
    hub.add(ID, FILES)
    hub.fault("HEAD", "config.json", status=429, headers={"Retry-After": "1"}, times=1)
    seconds, (config, _) = took(fetch)
    assert config == CONFIG and 1 <= seconds < 4


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "300"},
        {"RateLimit": '"resolvers";r=0;t=300', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'},
        {"Retry-After": "a date"},
    ],
    ids=["seconds", "ratelimit", "date"],
)
def test_a_long_rate_limit_is_told_at_once(hub, fetch, headers, method):
    if headers.get("Retry-After") == "a date":
        headers = {"Retry-After": email.utils.formatdate(time.time() + 301, usegmt=True)}
    hub.add(ID, FILES)
    hub.fault(method, "config.json", status=429, headers=headers)
    seconds, error = took(lambda: refused(fetch))
    assert seconds < 3
    assert "429" in error.message
    for told in (re.search(r"wait (\d+) seconds", error.message), re.search(r"try again in (\d+) seconds", error.hint)):
        assert told and 298 <= int(told[1]) <= 301
    assert [one.status for one in hub.asked(method)] == [429]


def test_what_is_left_of_a_rate_limit_does_not_stop_anyone(hub, fetch):
    """The header is on every answer of the Hub; only r=0 on a 429 is a limit."""
    hub.add(ID, FILES)
    hub.fault("HEAD", "config.json", status=429, headers={"RateLimit": '"resolvers";r=2998;t=300'}, times=1)
    hub.fault("HEAD", "config.json", headers={"RateLimit": '"resolvers";r=0;t=300'})
    assert fetch()[0] == CONFIG


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again(hub, fetch, method, status):
    hub.add(ID, FILES)
    hub.fault(method, "config.json", status=status, times=2)
    assert fetch()[0] == CONFIG
    assert [one.status for one in hub.asked(method)][:2] == [status, status]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_lasting_failure_is_tried_three_times(hub, fetch, monkeypatch, method):
    monkeypatch.setattr(client, "PAUSE", 0.1)
    hub.add(ID, FILES)
    hub.fault(method, "config.json", status=503)
    seconds, error = took(lambda: refused(fetch))
    assert "answers 503" in error.message and "not in the cache" in error.message
    assert len(hub.asked(method)) == 3 and 0.3 <= seconds < 3, "0.1 s and 0.2 s of pauses"


def test_a_lasting_failure_with_a_cached_copy_is_no_failure(hub, fetch):
    repo = hub.add(ID, FILES)
    fetch()
    hub.fault("HEAD", "config.json", status=503)
    assert fetch() == (CONFIG, {"kind": "hub", "id": ID, "commit": repo.commit})


@pytest.mark.parametrize(("method", "at"), [("HEAD", "head"), ("GET", "head"), ("GET", "body")])
def test_a_silent_server_is_left(hub, fetch, impatient, method, at):
    hub.add(ID, FILES)
    hub.fault(method, "resolve-cache", stall=20, at=at)
    seconds, error = took(lambda: refused(fetch))
    assert "does not answer" in error.message and len(hub.asked(method, "resolve-cache")) == 3
    assert 0.3 <= seconds < 4, "three times 0.1 s"


def test_one_silence_is_survived(hub, fetch, impatient):
    hub.add(ID, FILES)
    hub.fault("GET", "config.json", stall=20, at="body", times=1)
    assert fetch()[0] == CONFIG


def test_a_dripping_server_has_a_deadline(hub, fetch, monkeypatch):
    """Each byte comes in time, the file would not: 1 KiB at 0.05 s a byte."""
    monkeypatch.setattr(config_file, "CONFIG_SECONDS", 0.5)
    hub.add(ID, {"config.json": b"{}" + b" " * 1024})
    hub.fault("GET", "resolve-cache", trickle=0.05)
    seconds, error = took(lambda: refused(fetch))
    assert "did not answer within 0.5 seconds" in error.message and 0.45 < seconds < 3
    time.sleep(0.3)
    (get,) = hub.asked("GET", "resolve-cache")
    sent = get.sent
    time.sleep(0.3)
    assert get.sent == sent < 100, "nothing goes on behind the answer"


def test_what_no_timeout_bounds_has_a_deadline_too(hub, fetch, monkeypatch):
    """The look-up of a host's name takes no timeout; a resolver that answers nobody takes half a minute."""
    monkeypatch.setattr(config_file, "CONFIG_SECONDS", 0.3)
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(1) or real(*args, **kwargs))
    hub.add(ID, FILES)
    seconds, error = took(lambda: refused(fetch))
    assert "did not answer within 0.3 seconds" in error.message and seconds < 0.9


def test_the_bounds_that_users_get_are_within_20_seconds():
    source = Path(client.__file__).read_text(encoding="utf-8")
    values = dict(
        line.split(" = ") for line in source.splitlines() if line.startswith(("CONNECT", "TRIES", "CONFIG_SECONDS"))
    )
    (connect, read), (tries, pause) = eval(values["CONNECT, READ"]), eval(values["TRIES, PAUSE"])
    assert connect <= read <= 5 and tries * read + pause * (2 ** (tries - 1) - 1) < config_file.CONFIG_SECONDS <= 20
    assert model_search.SEARCH_SECONDS <= 3 and client.CONFIG_LIMIT == 4 * 2**20


def test_a_truncated_body_is_read_again(hub, fetch):
    hub.add(ID, FILES)
    hub.fault("GET", "resolve-cache", cut=10, times=2)
    assert fetch()[0] == CONFIG


def test_a_body_that_is_always_truncated_is_told_and_not_cached(hub, fetch, tmp_path):
    """huggingface_hub alone would go on for ever here: each try brings some bytes, and that resets its count."""
    hub.add(ID, FILES)
    hub.fault("GET", "resolve-cache", cut=10)
    seconds, error = took(lambda: refused(fetch))
    assert "broke off its answer" in error.message and seconds < 3
    assert len(hub.asked("GET")) == 3 and blobs(tmp_path) == []


def test_a_body_cut_where_no_length_was_told_is_not_cached(hub, fetch, tmp_path):
    """The look-up told the size, the download did not and ended early: no error of HTTP."""
    hub.add(ID, FILES)
    hub.fault("GET", "resolve-cache", cut=10, length=None)
    assert "another size" in refused(fetch).message
    assert blobs(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model_type": "llama"', "not valid JSON"),
        (b"<html>", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[1, 2]", "holds no JSON object"),
    ],
    ids=["cut", "html", "empty", "binary", "deep", "list"],
)
def test_what_is_no_json_object(hub, fetch, body, message):
    hub.add(ID, {"config.json": body})
    assert message in refused(fetch).message


# Sizes


def test_a_config_of_the_limit_is_read_and_one_byte_more_is_not(hub, fetch):
    hub.add(ID, {"config.json": b"{}" + b" " * (client.CONFIG_LIMIT - 2)})
    hub.add("acme/more", {"config.json": b"{}" + b" " * (client.CONFIG_LIMIT - 1)})
    assert fetch()[0] == {}
    assert f"{client.CONFIG_LIMIT + 1} bytes" in refused(fetch, "acme/more").message
    assert len(hub.asked("GET", "more")) == 0, "its size was told before"


def test_the_size_in_lfs_counts(hub, fetch):
    hub.add(ID, {"config.json": Sparse(b"{", 1 << 33)}, lfs=["config.json"])
    assert f"{1 << 33} bytes" in refused(fetch).message
    assert hub.asked("GET") == []


def test_a_size_that_only_the_download_tells(hub, fetch):
    hub.add(ID, FILES)
    hub.fault("HEAD", "resolve-cache", length=None)
    hub.fault("GET", "resolve-cache", length=1 << 33, endless=True)
    assert f"{1 << 33} bytes" in refused(fetch).message


@pytest.mark.parametrize("told", [None, 100])
def test_a_body_without_end_is_left_at_the_limit(hub, fetch, tmp_path, told):
    hub.add(ID, FILES)
    hub.fault("HEAD", "resolve-cache", length=told)
    hub.fault("GET", "resolve-cache", length=None, endless=True)
    assert "4194304 are read" in refused(fetch).message
    time.sleep(0.1)
    (get,) = hub.asked("GET")
    assert get.sent < client.CONFIG_LIMIT + (8 << 20), "the limit, and what the sockets hold"
    assert blobs(tmp_path) == []


def test_a_redirect_s_own_body_counts(hub, fetch):
    hub.add(ID, FILES, lfs=["config.json"])
    hub.fault("GET", "/cdn/", status=302, headers={"Location": "/cdn/x"}, length=None, endless=True)
    assert "4194304 are read" in refused(fetch).message


def test_a_bomb(hub, fetch):
    """Some KiB that unpack to 8 MiB: nothing compressed is asked for and none is unpacked."""
    hub.add(ID, FILES)
    packed = gzip.compress(b" " * (8 << 20))
    hub.fault("GET", "resolve-cache", body=packed, headers={"Content-Encoding": "gzip"})
    assert "compressed" in refused(fetch).message
    assert all(one.headers["accept-encoding"] == "identity" for one in hub.log)


# No network


def test_no_network(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        error = refused(config_file.fetch_config, "meta-llama/Lama-3.1-8B", endpoint=endpoint, cache_dir=str(tmp_path))
    assert "cannot be reached" in error.message and "Lama-3.1-8B is not in the cache" in error.message
    assert "check the network" in error.hint and "meta-llama/Llama-3.1-8B" in error.hint


def test_a_host_that_does_not_exist(tmp_path, monkeypatch):
    def unknown(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = refused(config_file.fetch_config, ID, endpoint="http://hub.invalid", cache_dir=str(tmp_path))
    assert "hub.invalid cannot be reached" in error.message and "Name or service not known" in error.message


@pytest.mark.parametrize("endpoint", ["ftp://127.0.0.1", "http://", "hub"])
def test_an_endpoint_that_is_none(tmp_path, endpoint):
    refused(config_file.fetch_config, ID, endpoint=endpoint, cache_dir=str(tmp_path))


def test_a_server_that_is_no_hub(hub, fetch):
    hub.add(ID, FILES)
    hub.fault("HEAD", "config.json", status=200)
    error = refused(fetch)
    assert "does not answer as a Hub does" in error.message and "HF_ENDPOINT" in error.hint


def test_offline_and_not_cached(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.add("qwen/Qwen3-8b", FILES)
    error = refused(fetch, "qwen/Qwen3-8b")
    assert "not in the cache" in error.message and "HF_HUB_OFFLINE" in error.message
    assert "Qwen/Qwen3-8B" in error.hint and hub.log == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_and_cached(hub, fetch, monkeypatch, variable):
    hub.add(ID, FILES, refs={"v1": "c" * 40})
    online, asked = fetch(), len(hub.log)
    monkeypatch.setenv(variable, "true")
    assert fetch() == online and fetch(revision=online[1]["commit"]) == online and len(hub.log) == asked
    assert f"{ID} at v1 is not in the cache" in refused(fetch, revision="v1").message


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    hub.add(ID, FILES)
    (tmp_path / "file").write_text("")
    error = refused(config_file.fetch_config, ID, endpoint=hub.endpoint, cache_dir=str(tmp_path / "file"))
    assert "cache" in error.message and "HF_HOME" in error.hint


def test_outside_of_its_calls_huggingface_hub_stays_offline(hub, tmp_path):
    """A stranger's config may name a backbone that transformers would download while it builds the model."""
    hub.add(ID, FILES)
    with pytest.raises(OfflineModeIsEnabled):
        huggingface_hub.HfApi(endpoint=hub.endpoint).model_info(ID)
    with pytest.raises(Exception, match="cannot find the requested files|offline"):
        huggingface_hub.hf_hub_download(ID, "config.json", endpoint=hub.endpoint, cache_dir=str(tmp_path))
    assert hub.log == []


# The user's own settings


def python(code: str, hub: HubServer, home: Path, **env: str) -> object:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    env = {**kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress bars and no warnings"
    return json.loads(done.stdout)


def test_endpoint_token_and_cache_are_the_user_s_own(hub, tmp_path):
    """A config by name in a fresh process, without torch; and while huggingface_hub is offline, as during a trace."""
    repo = hub.add(ID, FILES, private=True)
    code = f"""
import json, sys
import huggingface_hub
from vramplan.job import Job
from vramplan.planning.resolve import config_of
before = config_of(Job(model={ID!r}, method="lora"))
heavy = sorted({{"torch", "transformers"}} & set(sys.modules))
huggingface_hub.constants.HF_HUB_OFFLINE = True
answer = config_of(Job(model={ID!r}, method="lora"))
print(json.dumps([before, answer, huggingface_hub.constants.is_offline_mode(), heavy]))
"""
    answer = [CONFIG, {"kind": "hub", "id": ID, "commit": repo.commit}]
    assert python(code, hub, tmp_path, HF_TOKEN=TOKEN) == [answer, answer, True, []], (
        "read, no torch; and read while a trace has huggingface_hub offline"
    )
    assert all(one.headers["authorization"] == f"Bearer {TOKEN}" for one in hub.log)

    asked = len(hub.log)
    code = f"""
import json, huggingface_hub
theirs = huggingface_hub.hf_hub_download({ID!r}, "config.json")
from vramplan.hub.config_file import fetch_config
print(json.dumps([theirs, fetch_config({ID!r})]))
"""
    theirs, ours = python(code, hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (
        theirs.startswith(str(tmp_path / "hub" / "models--acme--")) and json.loads(Path(theirs).read_text()) == CONFIG
    )
    assert ours == answer and len(hub.log) == asked


def test_a_login_is_enough(hub, fetch, monkeypatch, tmp_path):
    hub.add(ID, FILES, gated=True)
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert fetch()[0] == CONFIG


# Weights


def safetensors(tensors: dict, pad: int = 0) -> Sparse:
    """A file of {name: (dtype, shape, bytes of one number)} whose tensors are zeros that nobody stores."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, width) in tensors.items():
        size = int(width)
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode() + b" " * pad
    return Sparse(struct.pack("<Q", len(text)) + text, 8 + len(text) + at)


def test_weights_are_counted_from_one_header(hub, plan_job):
    file = safetensors(
        {"embed": ("BF16", (128_000, 4096), 2), "scale": ("F32", (), 4), "packed": ("I32", (512, 64), 4)}
    )
    repo = hub.add(ID, {**FILES, "model.safetensors": file}, lfs=["model.safetensors"], private=True)
    assert plan_job(token=TOKEN) == {
        "parameters": 128_000 * 4096 + 1 + 512 * 64,
        "bytes": 128_000 * 4096 * 2 + 4 + 512 * 64 * 4,
        "by_dtype": {
            "BF16": {"parameters": 128_000 * 4096, "bytes": 128_000 * 4096 * 2},
            "F32": {"parameters": 1, "bytes": 4},
            "I32": {"parameters": 512 * 64, "bytes": 512 * 64 * 4},
        },
        "commit": repo.commit,
    }
    assert [one.headers["range"] for one in hub.asked("GET", ".safetensors")] == ["bytes=0-100000"] * 2
    assert all("authorization" not in one.headers for one in hub.asked(part="/cdn/"))
    assert sum(one.sent for one in hub.log) < 110_000 < 10**9 < len(file)


def test_weights_in_shards_are_counted_by_ranges_alone(hub, plan_job):
    """20 files of 10 GiB; one header is longer than the first read and takes a second."""
    shards = {
        f"model-{i:05}-of-00020.safetensors": safetensors(
            {f"layer.{i}": ("F8_E4M3", (1 << 20, 10240), 1)}, 250_000 * (i == 7)
        )
        for i in range(1, 21)
    }
    index = {"metadata": {}, "weight_map": {f"layer.{i}": name for i, name in enumerate(shards, 1)}}
    files = {**FILES, **shards, "model.safetensors.index.json": json.dumps(index).encode()}
    repo = hub.add(ID, files, lfs=list(shards), refs={"v2": "d" * 40})
    total = 20 * 10240 << 20
    assert plan_job(revision="v2") == {
        "parameters": total,
        "bytes": total,
        "by_dtype": {"F8_E4M3": {"parameters": total, "bytes": total}},
        "commit": "d" * 40,
    }
    reads = hub.asked("GET", "/cdn/")
    assert len(reads) == 21 and all(one.status == 206 for one in reads)
    assert [one.headers["range"] for one in reads if "00007" in one.path][1].startswith("bytes=8-250")
    assert all("d" * 40 in one.path for one in hub.asked("GET", "/resolve/")), "every shard of one commit"
    assert sum(one.sent for one in hub.log) < 21 * 110_000 + 250_000
    assert repo.commit != "d" * 40


def test_a_shard_that_fails_once_is_read_again_and_one_that_fails_is_told(hub, plan_job):
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    part = safetensors({"a": ("F16", (8, 8), 2)})
    files = {"a.safetensors": part, "b.safetensors": part, "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add(ID, files, lfs=["a.safetensors", "b.safetensors"])
    once = hub.fault("GET", "/cdn/acme/Llama-3.1-8B-tuned/b.safetensors", status=503, times=2)
    assert plan_job()["parameters"] == 128
    once.times = 1 << 30
    assert "answers 503" in refused(plan_job).message


def test_a_server_that_ignores_ranges_is_left_at_once(hub, plan_job):
    hub.add(ID, {"model.safetensors": safetensors({"a": ("BF16", (1 << 20, 8192), 2)})}, lfs=["model.safetensors"])
    hub.fault("GET", "/cdn/", status=200, headers={}, length=16 << 30, endless=True)
    seconds, error = took(lambda: refused(plan_job))
    assert "bytes or more" in error.message and seconds < 3


@pytest.mark.parametrize(
    "head",
    [
        b"\x01",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 59) + b'{"a":{"dtype":"F16","shape":[-2,-4],"data_offsets":[16,0]}}',
        struct.pack("<Q", 58) + b'{"a":{"dtype":"F16","shape":["x"],"data_offsets":[0,16]}} ',
    ],
    ids=["short", "giant", "text", "list", "negative", "words"],
)
def test_a_broken_header(hub, plan_job, head):
    hub.add(ID, {"model.safetensors": head})
    refused(plan_job)


@pytest.mark.parametrize("index", [b"{}", b'{"weight_map": {"a": 1}}', b'{"weight_map": []}', b"["])
def test_a_broken_index(hub, plan_job, index):
    hub.add(ID, {"model.safetensors.index.json": index})
    refused(plan_job)


def test_an_index_of_too_many_files(hub, plan_job):
    index = {"weight_map": {str(i): f"{i}.safetensors" for i in range(checkpoint_weights.SHARD_LIMIT + 1)}}
    hub.add(ID, {"model.safetensors.index.json": json.dumps(index).encode()})
    assert "2001 files" in refused(plan_job).message


def test_weights_that_cannot_be_read(hub, plan_job):
    hub.add(ID, {**FILES, "pytorch_model.bin": b"\x80"})
    assert "no safetensors weights" in refused(plan_job).message
    hub.add("acme/gated", {"model.safetensors": safetensors({})}, gated=True)
    assert "gated" in refused(plan_job, "acme/gated").message
    assert "has no model" in refused(plan_job, "acme/none").message
    assert refused(plan_job, revision="nope").field == "revision"
    assert "neither a file" in refused(plan_job, "a/b/c").message


def test_weights_of_a_folder_and_of_the_cache(hub, plan_job, tmp_path, monkeypatch):
    file = safetensors({"a": ("U8", (64, 64), 1)})
    counted = {"parameters": 4096, "bytes": 4096, "by_dtype": {"U8": {"parameters": 4096, "bytes": 4096}}}
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no safetensors weights" in refused(plan_job, str(folder)).message
    (folder / "model.safetensors").write_bytes(file[:])
    assert plan_job(str(folder)) == {**counted, "commit": None} and hub.log == []
    (folder / "model.safetensors").write_bytes(b"\0")
    assert "cannot be counted" in refused(plan_job, str(folder)).message

    repo = hub.add(ID, {"model.safetensors": file[:]})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.hf_hub_download(ID, "model.safetensors", endpoint=hub.endpoint, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.log)
    assert plan_job() == {**counted, "commit": repo.commit} and len(hub.log) == asked
    assert "HF_HUB_OFFLINE" in refused(plan_job, "acme/none").message


# Search


def test_search_is_the_hub_s_own(hub):
    for name in ("acme/llama-a", "acme/llama-b", "acme/llama-c", "acme/qwen"):
        hub.add(name, FILES)
    assert model_search.search("Llama", endpoint=hub.endpoint) == ["acme/llama-a", "acme/llama-b", "acme/llama-c"]
    assert model_search.search("llama", 2, endpoint=hub.endpoint, token=TOKEN) == ["acme/llama-a", "acme/llama-b"]
    assert "search=llama" in hub.log[-1].path and "limit=2" in hub.log[-1].path
    assert hub.log[-1].headers["authorization"] == f"Bearer {TOKEN}"


def test_search_that_fails_is_told_from_one_that_finds_nothing(hub, monkeypatch):
    hub.add(ID, FILES)
    monkeypatch.setattr(model_search, "SEARCH_SECONDS", 0.25)
    faults = [
        {"status": 500},
        {"status": 429},
        {"body": b"no json"},
        {"body": b'{"a": 1}'},
        {"cut": 3},
        {"stall": 5},
        {"trickle": 0.1},
    ]
    for fault in faults:
        hub.faults = []
        hub.fault("GET", "/api/models", **fault)
        seconds, found = took(lambda: model_search.search("llama", endpoint=hub.endpoint))
        assert found is None and seconds < 2, fault
    hub.faults = []
    assert model_search.search("llama", endpoint=hub.endpoint) == [ID]
    asked = len(hub.log)
    assert model_search.search("  ", endpoint=hub.endpoint) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_search.search("llama", endpoint=hub.endpoint) is None and len(hub.log) == asked


def test_models_are_the_catalogue_s_and_the_hub_s(hub, monkeypatch):
    """``GET /models``: the header says whether the Hub answered; without it the catalogue alone answers, soon."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(model_search, "SEARCH_SECONDS", 0.25)
    for name in ("acme/llama-a", "acme/llama-b", "meta-llama/Llama-3.1-8B", "acme/qwen"):
        hub.add(name, FILES)
    web = TestClient(create_app())

    def ask(**params) -> tuple[list, list, str]:
        answer = web.get("/models", params={"limit": 3} | params)
        ids = {
            source: [row["id"] for row in answer.json() if row["source"] == source] for source in ("catalogue", "hub")
        }
        return ids["catalogue"], ids["hub"], answer.headers["hub-search"]

    known, found, said = ask(q="llama")
    assert len(known) == 3 and found == ["acme/llama-a", "acme/llama-b"] and said == "answered"
    assert ask(q="nobody has this") == ([], [], "answered")
    hub.fault("GET", "/api/models", stall=5)
    seconds, answer = took(lambda: ask(q="llama"))
    assert answer == (known, [], "unanswered") and seconds < 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.log)
    assert ask(q="llama") == (known, [], "unanswered") and len(hub.log) == asked


def remote(model_type: str, **more) -> bytes:
    """A config.json whose code lives in its repository."""
    return json.dumps({"model_type": model_type, "auto_map": {"AutoModel": "modeling.Model"}, **more}).encode()


@pytest.mark.traces
def test_a_model_whose_code_is_in_its_repository_is_answered_with_its_weights(hub, monkeypatch, tmp_path):
    """Counted from headers, by ranges; its code is neither asked for nor run."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    files = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    weights = safetensors({"w": ("BF16", [1000, 1000], 2), "b": ("F32", [10], 4)})
    hub.add(ID, {**FILES, "config.json": remote("homemade"), "modeling.py": b"1/0", "model.safetensors": weights})
    with pytest.raises(PlanError) as error:
        plan({"model": ID})
    told = error.value.as_dict()
    assert "homemade" in told["message"] and "never run" in told["hint"]
    assert told["weights"]["parameters"] == 1_000_010 and told["weights"]["bytes"] == 2_000_040
    assert told["weights"]["from"] == "safetensors headers"
    assert not any("modeling.py" in request.path for request in hub.log)

    (folder := tmp_path / "mine").mkdir()
    (folder / "config.json").write_bytes(remote("homemade"))
    (folder / "model.safetensors").write_bytes(weights[:])
    with pytest.raises(PlanError) as error:
        plan({"model": str(folder)})
    assert error.value.weights["bytes"] == 2_000_040


def test_the_nearest_of_the_catalogue():
    assert refusals.nearest("llama-3.1-8b", 1) == ["meta-llama/Llama-3.1-8B"]
    assert refusals.nearest("someone/Qwen2.5-7B-Instruct-GPTQ", 1)[0].startswith("Qwen/Qwen2.5-7B")
    assert len(refusals.nearest("zzz")) == 3 and set(refusals.nearest("")) <= IDS
