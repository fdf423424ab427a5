"""The HTTP API: the same answers and the same errors as the command line, one shape for every failure."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from tiny import BAD, JOB
from vramplan.cli.other_commands import LOOPBACK
from vramplan.errors import PlanError
from vramplan.job import Job
from vramplan.planning.estimate import estimate
from vramplan.schema import Advice, Answer, Comparison, Solved
from vramplan.server import app as web
from vramplan.server import failures, json_api, runner
from vramplan.server import trace_pool as workers

PATIENCE = 120
"""Seconds in which what is waited for must have come: a bound for what never comes, not for speed."""


@pytest.fixture(scope="module")
def client():
    with TestClient(web.create_app()) as client:
        yield client


def error_of(response, status):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and body["error"]["message"] and "hint" in body["error"]
    assert "Traceback" not in response.text
    return body["error"]


def test_estimate_gives_the_answer_of_the_service(client):
    answer = client.post("/estimate", json=JOB)
    assert answer.status_code == 200
    assert answer.json() == json.loads(json.dumps(estimate(JOB)))


def test_all_layers_opens_the_repeated_ones(client):
    paths = [layer["path"] for layer in client.post("/estimate?all_layers=true", json=JOB).json()["layers"]]
    assert "model.layers.1.self_attn.q_proj" in paths


def test_the_page_s_address_is_a_job_too(client):
    answer = client.get("/estimate.json", params={"model": "pythia-70m", "method": "lora", "sequence_length": 64})
    assert answer.json()["job"]["model"] == "pythia-70m" and answer.json()["job"]["sequence_length"] == 64


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_planned_is_422_with_the_text_of_the_command_line(client, name):
    job, message, also, field = BAD[name]
    with pytest.raises(PlanError) as told:
        estimate(job)
    error = error_of(client.post("/estimate", json=job), 422)
    assert error == told.value.as_dict()
    assert message in error["message"] and also in error["message"] + error["hint"]
    assert error.get("field") == field


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{not json", "the body is not JSON"),
        (b"[" * 100_000, "the request cannot be read"),
        (b"\xffx", "the request cannot be read"),
        (b"[1]", "a job is a JSON object"),
        (b'"model"', "a job is a JSON object"),
        (b"null", "a job is a JSON object"),
        (b"", "the request: field required"),
    ],
)
def test_a_malformed_body_is_told_in_the_same_shape(client, body, message):
    response = client.post("/estimate", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert message in error_of(response, response.status_code)["message"]


def test_the_wrong_address_and_method_have_the_same_shape(client):
    error_of(client.get("/nothing"), 404)
    error_of(client.delete("/estimate"), 405)
    error_of(client.get("/models?limit=many"), 422)


def test_a_body_that_is_too_large_is_413(client):
    error_of(client.post("/estimate", content=b" " * (failures.BODY_LIMIT + 1)), 413)
    chunks = (b" " * (1 << 20) for _ in range(5))
    error_of(client.post("/estimate", content=chunks, headers={"content-type": "application/json"}), 413)
    just = b" " * (failures.BODY_LIMIT - 200) + json.dumps(BAD["neither"][0]).encode()
    error_of(client.post("/estimate", content=just, headers={"content-type": "application/json"}), 422)


def test_a_batch_keeps_order_ids_and_errors(client):
    items = [{"id": 7, "job": JOB}, BAD["negative batch"][0], 3, {"id": None, "job": {}}, {**JOB, "method": "full"}]
    good, bad, strange, empty, last = client.post("/estimate/batch", json=items).json()
    assert good["id"] == 7 and good["peak"] == estimate(JOB)["peak"]
    assert bad["error"]["field"] == "batch_size" and "id" not in bad
    assert "JSON object" in strange["error"]["message"]
    assert empty["id"] is None and "exactly one" in empty["error"]["message"]
    assert last["job"]["method"] == "full"
    error_of(client.post("/estimate/batch", json={"model": "x"}), 422)
    error_of(client.post("/estimate/batch", json=[{}] * (json_api.BATCH_LIMIT + 1)), 422)


def test_solve_finds_the_largest(client):
    job = {**JOB, "memory_limit_bytes": 40 << 20}
    solved = client.post("/solve", json=job).json()
    assert solved["batch_size"] > 1 and solved["tries"][str(solved["batch_size"])] is True
    tagged = client.post("/solve?for=batch_size", json={"id": 4, "job": JOB, "memory_limit_bytes": 40 << 20}).json()
    assert (tagged["id"], tagged["batch_size"]) == (4, solved["batch_size"])
    Solved.model_validate(solved)
    assert error_of(client.post("/solve?for=luck", json=job), 422)["field"] == "for"
    assert error_of(client.post("/solve", json=JOB), 422)["field"] == "memory_limit_bytes"


def test_compare_answers_as_json_and_as_csv_and_reads_no_files_of_the_server(client, tmp_path):
    what = {"job": JOB, "over": {"lora.r": [4, 8], "gpu": ["t4", "a100-80gb"]}}
    answer = client.post("/compare", json=what).json()
    Comparison.model_validate(answer)
    assert [row["varied"]["lora.r"] for row in answer["rows"]] == [4, 4, 8, 8]
    text = client.post("/compare?format=csv", json=what)
    assert text.headers["content-type"].startswith("text/csv") and len(text.text.splitlines()) == 5
    assert error_of(client.post("/compare", json={"jobs": []}), 422)["field"] == "jobs"
    path = tmp_path / "config.json"
    path.write_text("{}")
    for asked in (
        {"jobs": [{"model": str(path)}]},
        {"job": {"method": "lora"}, "over": {"model": [str(path)]}},
        {"job": {"model": str(path)}, "over": {"lora.r": [4]}},
    ):
        assert "no files" in error_of(client.post("/compare", json=asked), 422)["message"]


def test_solve_takes_a_card_and_finds_one(client):
    solved = client.post("/solve", json={**JOB, "gpu": "rtx-2060", "reserve": 1 << 30}).json()
    Solved.model_validate(solved)
    assert 0 < solved["sure"] <= solved["batch_size"]
    found = client.post("/solve?for=gpu", json={**JOB, "prices": {"t4": 0.3, "a100-80gb": 2}}).json()
    Solved.model_validate(found)
    assert found["gpu"] == "a100-80gb"  # a T4 has no bfloat16
    assert "3g.40gb" in next(row for row in client.get("/gpus").json() if row["key"] == "h100")["parts"]


def test_advice_is_planned_changes(client):
    job = {**JOB, "method": "full", "batch_size": 64, "gpu": {"memory_bytes": 590 << 20}}
    advice = client.post("/advise", json=job).json()
    Advice.model_validate(advice)
    assert advice["now"]["verdict"] == "does_not_fit"
    for option in advice["suggestions"]:
        changed = client.post("/estimate", json={**job, **option["change"]}).json()
        assert changed["fits"][0]["headroom"] == option["headroom"]
    assert error_of(client.post("/advise", json=JOB), 422)["field"] == "gpu"


def test_a_fault_of_the_planner_is_500_and_one_sentence(client, monkeypatch):
    monkeypatch.setattr("vramplan.planning.estimate.estimate", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in error_of(client.post("/estimate", json={**JOB, "batch_size": 31}), 500)["message"]
    failed = client.post("/estimate/batch", json=[JOB]).json()
    assert "ZeroDivisionError" in failed[0]["error"]["message"]


@pytest.mark.parametrize("name", ["/etc", "./config.json", "../x", "~/model", "a/b/c", "tests", "C:\\models"])
def test_files_of_the_server_are_read_for_its_own_users_only(client, name):
    error = error_of(client.post("/estimate", json={"model": name}), 422)
    assert "reads no files" in error["message"] and error["field"] == "model"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(name, status):
    """A page of evil.example whose name now means 127.0.0.1 is of the same origin, and local."""
    own = TestClient(web.create_app(local_files=True, hosts=LOOPBACK))
    answer = own.get("/health", headers={"host": name})
    assert answer.status_code == status
    if status != 200:
        assert "--allow-host" in error_of(answer, status)["hint"]


@pytest.mark.parametrize("path", ["/estimate.json?model=pythia-70m", "/picture.png?model=pythia-70m", "/advice"])
def test_a_page_of_another_site_can_have_nothing_computed(client, path):
    error_of(client.get(path, headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}), 403)
    framed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    error_of(client.get(path, headers=framed), 403)


def test_a_link_on_another_site_may_be_followed(client):
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/health", headers=link).status_code == 200


def test_a_local_folder_is_a_model_where_it_is_allowed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(JOB["config"]))
    job = {**JOB, "model": str(tmp_path)}
    del job["config"]
    answer = TestClient(web.create_app(local_files=True)).post("/estimate", json=job)
    assert answer.json()["model"]["kind"] == "file"


def test_a_full_line_is_503(monkeypatch):
    running, most, lock, gate = 0, 0, threading.Lock(), threading.Event()

    def slow(job, **_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(PATIENCE)
        with lock:
            running -= 1
        return {"peak": job.batch_size, "model": {"kind": "hub"}}

    monkeypatch.setattr(runner, "plan", slow)
    places = runner.THREADS + workers.QUEUE_LIMIT
    with TestClient(web.create_app()) as client, ThreadPoolExecutor(places + 1) as pool:
        ask = lambda size: client.post("/estimate", json={**JOB, "batch_size": size})  # noqa: E731
        pending = [pool.submit(ask, size) for size in range(1, places + 1)]
        try:
            until = time.monotonic() + PATIENCE
            while client.get("/health").json()["waiting"] < workers.QUEUE_LIMIT and time.monotonic() < until:
                time.sleep(0.01)
            busy = pool.submit(ask, 99).result(timeout=PATIENCE)
        finally:
            gate.set()
        answers = sorted(job.result().json()["peak"] for job in pending)
    assert "waiting" in error_of(busy, 503)["message"] and int(busy.headers["retry-after"]) > 0
    assert answers == list(range(1, places + 1)) and most == runner.THREADS


def test_the_same_question_is_answered_again_without_planning(monkeypatch):
    asked = []
    real = runner.plan
    monkeypatch.setattr(runner, "plan", lambda job, **k: asked.append(1) or real(job, **k))
    with TestClient(web.create_app()) as client:
        one, same = (client.post("/estimate", json={**JOB, "batch_size": 3}) for _ in range(2))
        assert one.json() == same.json() and len(asked) == 1
        assert same.headers["content-security-policy"] and same.headers["content-encoding"] == "gzip"
        plain = client.post("/estimate", json={**JOB, "batch_size": 3}, headers={"accept-encoding": "identity"})
        assert plain.json() == one.json() and "content-encoding" not in plain.headers
        client.post("/estimate?all_layers=true", json={**JOB, "batch_size": 3})
        client.post("/estimate", json={**JOB, "batch_size": 0})
        client.post("/estimate", json={**JOB, "batch_size": 0})
    assert len(asked) == 3


def test_searches_are_answered_again_too(monkeypatch):
    """Not so for a model of a folder, whose config may change."""
    asked = []
    real = runner.RequestRunner.run
    monkeypatch.setattr(runner.RequestRunner, "run", lambda self, *rest: asked.append(1) or real(self, *rest))
    with TestClient(web.create_app(local_files=True)) as client:
        job = {**JOB, "gpu": "t4"}
        found = [client.post(path, json=job).json() for path in ("/solve", "/solve?for=sequence_length", "/advise") * 2]
        assert found[:3] == found[3:] and found[0] != found[1] and len(asked) == 3
        for _ in range(2):
            client.post("/solve", json={**job, "config": None, "model": "/nowhere"})
        assert len(asked) == 5


def test_who_waits_is_told_what_is_being_done():
    with TestClient(web.create_app()) as client, ThreadPoolExecutor(1) as pool:
        deep = {**JOB, "config": {**JOB["config"], "num_hidden_layers": 500}}
        asked = pool.submit(client.post, "/estimate", json=deep, headers={"X-Request-Id": "mine"})
        seen = []
        while not asked.done():
            seen.append(client.get("/progress/mine").json())
            time.sleep(0.005)
        assert asked.result().status_code == 200
        assert any(word["state"] == "running" and "layers" in word["doing"] for word in seen)
        assert client.get("/progress/mine").json()["state"] == "done"


def test_the_catalogues(client):
    gpus = client.get("/gpus").json()
    assert [gpu["total_memory"] for gpu in gpus] == sorted(gpu["total_memory"] for gpu in gpus)
    assert "a100-80gb" in {gpu["key"] for gpu in gpus}
    found = client.get("/models", params={"q": "llama 3.1 8b"}).json()
    assert found[0]["id"] == "meta-llama/Llama-3.1-8B" and found[0]["model_type"] == "llama"


def test_health_says_the_version(client):
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["version"] and health["waiting"] == 0 and health["can_trace"]


@pytest.mark.parametrize("path", ["/", "/health", "/nothing", "/static/page.css"])
def test_every_response_has_the_policy(client, path):
    params = {"model": "x", "nope": "1"} if path == "/" else {}
    headers = client.get(path, params=params).headers
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_openapi_documents_the_job_by_its_schema_with_jobs_that_can_be_read(client):
    api = client.get("/openapi.json").json()
    body = api["paths"]["/estimate"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("/Job")
    assert set(api["components"]["schemas"]["Job"]["properties"]) == set(Job.model_fields)
    for example in body["examples"].values():
        Job.model_validate(example["value"])
    assert {"200", "413", "422", "500", "503"} <= set(api["paths"]["/estimate"]["post"]["responses"])
    assert api["paths"]["/estimate"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]


def test_every_field_of_an_answer_is_documented():
    def undocumented(model, path):
        for name in model.model_extra or {}:
            yield f"{path}{name}"
        for name, value in model:
            for item in value if isinstance(value, list) else [value]:
                if hasattr(item, "model_extra"):
                    yield from undocumented(item, f"{path}{name}.")

    assert not list(undocumented(Answer.model_validate(estimate(JOB)), ""))
