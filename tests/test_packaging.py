"""The package as its users get it: wheel and sdist, each installed without torch, asked from another folder."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
import urllib.request
import venv
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SECONDS = 300
"""After which a command counts as hanging."""
API = """
import sys
from vramplan import Answer, Job, PlanError, compare, plan
answer = plan(Job(model="llama-3.1-8b", method="qlora", gpu="a100-80gb"))
assert isinstance(answer, Answer) and sum(answer.parts.values()) == answer.peak.allocated
assert answer.fits[0].verdict == "fits"
try:
    plan({"model": "gpt2", "method": "lora", "lora": {"r": 3}})
except PlanError as error:
    assert "vramplan[trace]" in error.hint and "torch" in error.message
jobs = [{"model": "llama-3.1-8b", "method": "qlora"}, {"model": "gpt2", "method": "lora", "lora": {"r": 3}}]
rows = compare(jobs).rows
assert rows[0].peak["allocated"] == answer.peak.allocated and "torch" in rows[1].error["message"]
assert "torch" not in sys.modules
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run outside the checkout with nothing of its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VRAMPLAN"))}
    env = {**kept, "VRAMPLAN_CACHE": str(cwd / "cache"), "COLUMNS": "100"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, built from the files that the checkout has."""
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    for name in ("app", "templates", "static", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> dict[str, Path]:
    """The ``bin`` folder of an environment for each. The sdist's borrows what the wheel's was given beside it."""
    out = {}
    for name, file in built.items():
        folder = tmp_path_factory.mktemp(name)
        venv.create(folder / "env", with_pip=False, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", folder / "env" / "bin" / "python", "install", "--no-compile"]
        if not out:
            run(*pip, "-q", "-c", ROOT / "requirements-core.lock", file, cwd=folder)
        else:
            run(*pip, "-q", "--no-deps", file, cwd=folder)
            site = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
            (folder / "env" / site / "beside.pth").write_text(str(out["wheel"].parent / site))
        out[name] = folder / "env" / "bin"
    return out


def test_the_wheel_has_every_module_and_every_file_of_data(built):
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    modules = {f"vramplan/{path.relative_to(ROOT / 'app')}" for path in (ROOT / "app").rglob("*.py")}
    data = {
        f"vramplan/{folder}/{path.name}" for folder in ("static", "templates") for path in (ROOT / folder).iterdir()
    }
    data |= {
        "vramplan/py.typed",
        *(f"vramplan/catalog/{name}" for name in ("profiles.db", "stack.json", "accuracy.json")),
    }
    assert modules | data - {"vramplan/static/vendor"} <= names
    assert {name.split("/")[0] for name in names} == {"vramplan", f"vramplan-{version()}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_has_what_the_wheel_is_built_from(built):
    names = {name.partition("/")[2] for name in tarfile.open(built["sdist"]).getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "app/cli/entry.py", "templates/base.html"} <= names
    assert {"static/page.css", "static/vendor/htmx.js", "app/catalog/profiles.db", "app/py.typed"} <= names


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "app/__init__.py").read_text())[1]


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_the_command_line_answers_a_known_job_without_torch(installed, name, tmp_path):
    vramplan = installed[name] / "vramplan"
    assert "Fits an RTX A6000" in run(vramplan, "demo", cwd=tmp_path)
    out = run(vramplan, "estimate", "llama-3.1-8b", "-m", "qlora", "-g", "a100-80gb", "--json", cwd=tmp_path)
    assert json.loads(out)["fits"][0]["verdict"] == "fits"
    assert "torch 2." in run(vramplan, "version", cwd=tmp_path)
    run(installed[name] / "python", "-m", "vramplan", "gpus", cwd=tmp_path)


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_the_api_is_imported_without_torch(installed, name, tmp_path):
    run(installed[name] / "python", "-c", API, cwd=tmp_path)


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_the_server_serves_without_torch(installed, name, tmp_path):
    job = "model=llama-3.1-8b&method=qlora&gpu=a100-80gb"
    with served(installed[name] / "vramplan", tmp_path) as fetch:
        status, health = fetch("/health")
        assert status == 200 and json.loads(health)["can_trace"] is False
        assert [fetch(path)[0] for path in ("/", f"/?{job}", "/accuracy", "/static/page.css", "/how-it-works")] == [
            200
        ] * 5
        status, picture = fetch(f"/picture.png?{job}")
        assert status == 200 and picture.startswith(b"\x89PNG")
        status, refused = fetch("/estimate.json?model=gpt2&method=lora&lora.r=3")
        assert status == 422 and "vramplan[trace]" in json.loads(refused)["error"]["hint"]


@contextmanager
def served(vramplan: Path, folder: Path):
    """A running server: a function from a path to status and body."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "VRAMPLAN_CACHE": str(folder / "cache")}
    env = {key: value for key, value in env.items() if not key.startswith("PYTHON")}
    server = subprocess.Popen([vramplan, "serve", "--port", str(port)], cwd=folder, env=env)

    def fetch(path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    try:
        end = time.monotonic() + 60
        while True:
            try:
                fetch("/health")
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < end, "it never answered"
                time.sleep(0.1)
        yield fetch
    finally:
        server.terminate()
        server.wait(30)


def test_the_packages_are_the_folders():
    named = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in (ROOT / "app").rglob("*.py")}
    ours = {".".join(("vramplan", *folder.relative_to(ROOT / "app").parts)) for folder in folders}
    assert named == ours | {"vramplan.static", "vramplan.static.vendor", "vramplan.templates"}


def test_no_dependency_stands_twice():
    extras = PROJECT["project"]["optional-dependencies"].values()
    names = [
        re.split(r"[<>=\[ ]", line)[0] for group in (PROJECT["project"]["dependencies"], *extras) for line in group
    ]
    names = [name for name in names if name != "vramplan"]
    assert len(names) == len(set(names))


def test_the_lock_files_pin_every_package_once():
    core, rest = ((ROOT / name).read_text().splitlines() for name in ("requirements-core.lock", "requirements.lock"))
    assert "-r requirements-core.lock" in rest
    pinned = [line for line in core + rest if not line.startswith(("#", "-r"))]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in pinned)
    names = [line.partition("==")[0] for line in pinned]
    assert len(names) == len(set(names)) and not {"torch", "transformers", "rapidfuzz"} & {*core}
    asked = [re.split(r"[<>=\[]", line)[0].lower() for line in PROJECT["project"]["dependencies"]]
    assert set(asked) <= {line.partition("==")[0] for line in core}
    alone = [line for line in (ROOT / "requirements-nodeps.lock").read_text().splitlines() if line[0] != "#"]
    assert alone == PROJECT["project"]["optional-dependencies"]["liger"]
