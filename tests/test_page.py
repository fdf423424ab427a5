"""The page as the server writes it: whole without JavaScript, and quiet towards every other host."""

import asyncio
import io
import json
import re
from html.parser import HTMLParser
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tiny import JOB, LLAMA
from vramplan.planning.estimate import estimate
from vramplan.render import html, words
from vramplan.server import app as web
from vramplan.server import runner

ADDRESS = {"model": "pythia-70m", "method": "lora", "gpu": "t4", "batch_size": "1", "sequence_length": "64"}

SMALL = {
    "config": json.dumps(LLAMA),
    "method": "full",
    "gpu": "590MiB",
    "batch_size": "64",
    "sequence_length": "64",
}
"""A job that does not fit, and is advised in a moment."""


@pytest.fixture(scope="module")
def client():
    with TestClient(web.create_app()) as client:
        yield client


@pytest.fixture(scope="module")
def page(client):
    response = client.get("/", params=ADDRESS)
    assert response.status_code == 200
    return response.text


@pytest.fixture(scope="module")
def answer():
    return estimate({**JOB, "gpu": "a100-80gb"})


class Tags(HTMLParser):
    """Every start tag of a document with its attributes; and whether the tags nest."""

    VOID = {"meta", "link", "input", "option", "br"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def all(self, *names):
        return [attributes for tag, attributes in self.found if tag in names]


def test_the_address_is_the_answer(page):
    assert re.search(r"</svg>Fits a Tesla T4 with [\d.]+\sGiB to spare</h1>", page)
    for word in ("EleutherAI/pythia-70m", "phases", "Cards that fit", "Layer by layer", "Steady step", "curl -s http"):
        assert word in page, word


def test_the_document_nests_and_every_control_has_a_label_and_every_reference_a_target(page):
    tags = Tags(page)
    assert tags.open == []
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {label["for"] for label in tags.all("label") if "for" in label}
    for control in tags.all("input", "select", "textarea"):
        assert control.get("id") in labels or control.get("aria-label") or control["class"] == "unfold", control
    for attributes in (attributes for _, attributes in tags.found):
        for key in ("aria-describedby", "aria-labelledby", "aria-controls", "list"):
            assert set((attributes.get(key) or "").split()) <= set(ids)


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(page):
    tags = Tags(page)
    assert not tags.all("style") and all(template.get("src") for template in tags.all("script"))
    for _, attributes in tags.found:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "/").startswith(("/", "#")), attributes


def test_the_form_keeps_what_was_asked(page):
    tags = Tags(page)
    inputs = {control.get("name"): control.get("value") for control in tags.all("input")}
    assert {key: inputs[key] for key in ("model", "gpu", "batch_size", "sequence_length")} == {
        key: ADDRESS[key] for key in ("model", "gpu", "batch_size", "sequence_length")
    }
    assert [control["value"] for control in tags.all("input") if "checked" in control] == ["lora"]


def test_every_field_of_the_form_is_one_of_the_job():
    from vramplan.form import fields

    for name in (*html.MAIN, *(name for names in html.FOLDED.values() for name in names)):
        assert name in fields(), name


def test_links_hold_whole_jobs(client, page):
    links = [link["href"] for link in Tags(page).all("a")]
    answers = [link for link in links if link.startswith("/estimate.json?")]
    assert client.get(answers[0]).json()["job"]["gpu"] == "t4"
    cards = [parse_qs(urlsplit(link).query) for link in links if "gpu=h100" in link and "pythia" in link]
    assert cards and all(card["sequence_length"] == ["64"] for card in cards)
    for address in (*html.EXAMPLES.values(), html.FIRST_VISIT):
        from vramplan.form import to_job
        from vramplan.job import read_job

        read_job(to_job(address.items()))


def test_the_first_visit_shows_a_real_answer(client, monkeypatch):
    asked = []
    real = runner.plan
    monkeypatch.setattr(runner, "plan", lambda job, **k: asked.append(job) or real({**JOB, "gpu": job["gpu"]}, **k))
    response = client.get("/")
    assert "</svg>Fits an A100-SXM4-80GB with" in response.text
    assert asked[0]["model"] == html.FIRST_VISIT["model"]


@pytest.mark.parametrize(
    "change, control, message",
    [
        ({"batch_size": "-1"}, "batch_size", "Batch size takes a whole number from 1 on, not -1"),
        ({"batch_size": "9" * 9}, "batch_size", "Batch size takes a whole number up to 10,000,000, not 999999999"),
        ({"batch_size": "1.5"}, "batch_size", "Batch size takes a whole number from 1 on, not 1.5"),
        ({"model": "gpt2", "sequence_length": "5000"}, "sequence_length", "1024"),
        ({"gpu": "t44"}, "gpu", "no GPU called"),
        ({"lora.r": "0"}, "lora.r", "Rank takes a whole number from 1 on, not 0"),
        ({"lora.alpha": "0"}, "lora.alpha", "Alpha takes a number above 0, not 0"),
        ({"lora.dropout": "2"}, "lora.dropout", "Dropout takes a number up to 1, not 2"),
        ({"image_size": "1"}, "image_size", "Image size cannot be 1"),
        ({"attention_mask": "some"}, "attention_mask", "Attention mask takes absent, full, padded or packed, not some"),
        ({"model": " "}, "model", "no model is named"),
        ({"lora.target_modules": "nope"}, "lora.r", "nope"),
        ({"optimizer": "adam"}, "optimizer", "adam"),
        ({"batchsize": "2"}, None, "unknown field “batchsize”"),
    ],
)
def test_an_error_stands_at_its_field_and_the_rest_of_the_form_is_kept(client, change, control, message):
    response = client.get("/", params={**ADDRESS, **change})
    assert response.status_code == 422
    tags = Tags(response.text)
    assert message in response.text
    assert 'value="pythia-70m"' in response.text or "model" in change
    wrong = [c["name"] for c in tags.all("input", "select", "textarea") if c.get("aria-invalid")]
    assert wrong == ([control] if control else [])
    if control:
        at = response.text.index(f'id="e-{control}"')
        assert message in response.text[at : at + 600].replace("&#39;", "'")


def test_a_config_is_planned_and_its_address_holds_it(client):
    form = {
        "model": "left over",
        "method": "lora",
        "trainer": "pytorch",
        "sequence_length": "64",
        "config": json.dumps(LLAMA, indent=4),
    }
    response = client.post("/", data=form)
    assert response.status_code == 200 and "LlamaForCausalLM" in response.text
    assert "&#34;hidden_size&#34;: 64" in response.text
    assert json.loads(parse_qs(urlsplit(str(response.url)).query)["config"][0]) == LLAMA
    uploaded = client.post("/", data={**form, "config": ""}, files={"file": ("config.json", form["config"].encode())})
    assert uploaded.url == response.url and uploaded.text == response.text
    broken = client.post("/", data={**form, "config": "{"})
    assert broken.status_code == 422 and "the config is not JSON" in broken.text


def test_a_config_that_is_too_long_for_an_address_is_planned_where_it_was_sent(client):
    config = json.dumps({**LLAMA, "id2label": {str(i): f"label {i}" for i in range(2000)}})
    response = client.post(
        "/", data={"method": "lora", "trainer": "pytorch", "sequence_length": "64", "config": config}
    )
    assert response.status_code == 200 and urlsplit(str(response.url)).query == ""
    assert "LlamaForCausalLM" in response.text and "no link holds this result" in response.text
    assert "/estimate.json?" not in response.text and response.headers["hx-replace-url"] == "false"


def test_changes_that_make_it_fit_are_one_click_each(client):
    page = client.get("/", params=SMALL)
    assert "</svg>Does not fit a card of 590 MiB" in page.text
    ask = next(link["href"] for link in Tags(page.text).all("a") if link.get("class") == "ask")
    advised = client.get(ask)
    at = advised.text.index('id="advice"')
    section = advised.text[at : advised.text.index("</section>", at)]
    changes = re.findall(r'<li><a href="([^"]+)">[^<]+</a><strong>', section)
    assert changes
    for change in changes:
        assert re.search("</svg>(Fits|Tight)", client.get(change.replace("&amp;", "&")).text)
    assert "What would make it fit" not in client.get("/", params=ADDRESS).text


def test_advice_comes_in_parts_and_is_remembered(client, monkeypatch):
    places = [tag["data-ask"] for tag in Tags(client.get("/", params=SMALL).text).all("div", "li") if "data-ask" in tag]
    assert [urlsplit(place).path for place in places] == [
        "/advice/changes",
        "/advice/batch_size",
        "/advice/sequence_length",
        "/advice/trainers",
    ]
    parts = [client.get(place).text for place in places]
    assert all(Tags(part).open == [] and "<html" not in part for part in parts)
    assert '<ul class="changes">' in parts[0] and "the largest batch" in parts[1] and "tokens" in parts[2]
    assert "The same job reserves" in parts[3]
    whole = client.get("/advice?" + urlsplit(places[0]).query).text
    assert all(part.strip() in whole for part in parts)
    monkeypatch.setattr(runner, "plan", lambda *_, **__: pytest.fail("planned again"))
    assert [client.get(place).text for place in places] == parts


def test_a_part_that_cannot_be_says_why_as_json(client):
    wrong = client.get("/advice/changes", params={**SMALL, "batch_size": "-1"})
    assert wrong.status_code == 422 and wrong.json()["error"]["field"] == "batch_size"
    assert client.get("/advice/nothing", params=SMALL).status_code == 422


def test_the_largest_batch_and_length_are_links(client):
    advised = client.get("/advice", params={**ADDRESS, "gpu": "1GiB"}).text
    section = advised[advised.index('id="advice"') :]
    largest = re.findall(r'<li><a href="([^"]+)">(\d+)</a> (is the largest batch|tokens are the longest)', section)
    assert [what[:2] for _, _, what in largest] == ["is", "to"]
    batch = parse_qs(urlsplit(largest[0][0].replace("&amp;", "&")).query)["batch_size"]
    assert batch == [largest[0][1]] and int(batch[0]) > 1


def test_a_model_that_is_shown_no_tokens_has_no_longest_sequence(client):
    vit = {"model": "google/vit-base-patch16-224", "method": "full", "gpu": "t4", "batch_size": "2"}
    page = client.get("/", params=vit).text
    assert 'data-ask="/advice/batch_size' in page and 'data-ask="/advice/sequence_length' not in page
    assert "is the largest batch<" in page


def test_a_change_keeps_the_rest_of_the_job():
    view = html.View({**ADDRESS, "lora.r": "8", "config": "{}"}, None, None, "", "")
    kept = dict(parse_qs(html.with_change(view, {"lora": {"r": 4, "use_dora": True, "modules_to_save": ()}})))
    assert kept["lora.r"] == ["4"] and kept["lora.use_dora"] == ["true"] and kept["gpu"] == ["t4"]
    assert "config" in kept and "lora.modules_to_save" not in kept


def test_what_is_typed_is_never_markup(client):
    response = client.get("/", params={**ADDRESS, "model": '"><script>alert(1)</script>', "x<b>": "</textarea><i>"})
    assert "<script>alert" not in response.text and "<b>" not in response.text and "</textarea><i>" not in response.text


def test_the_bar_s_parts_fill_it_exactly(answer):
    bar = html.bar(answer)
    assert sum(segment.bytes for segment in bar.segments) == answer["peak"]["process"]
    assert bar.card == 100 and bar.total == answer["fits"][0]["memory_bytes"]
    end = bar.segments[-1].x + bar.segments[-1].width
    assert end == pytest.approx(100 * answer["peak"]["process"] / bar.total, abs=0.01)


def test_the_bar_shows_what_a_card_lacks():
    bar = html.bar(estimate({**JOB, "gpu": {"memory_bytes": 300 << 20}}))
    assert 0 < bar.card < 100 and bar.segments[-1].x + bar.segments[-1].width == pytest.approx(100, abs=0.01)


def test_the_timeline_is_highest_at_the_peak(answer):
    timeline = html.timeline(answer)
    drawn = html.moments(answer, timeline)
    heights = [sum(alive) for alive in zip(*drawn["alive"], strict=True)]
    assert heights == [point["allocated"] for point in timeline.points] and len(heights) == len(drawn["event"])
    assert max(heights) == heights[drawn["peak"]] == answer["peak"]["allocated"]
    assert all(height <= reserved for height, reserved in zip(heights, drawn["reserved"], strict=True))
    assert drawn["event"] == sorted(drawn["event"]) and drawn["limit"] is None
    steps = ["First step", "Steady step"]
    phases = [("Load", "load"), *((step, phase) for step in steps for phase in ("forward", "backward", "optimizer"))]
    assert [(title, phase) for title, phase, _ in drawn["phases"]] == phases
    ends = [end for *_, end in drawn["phases"]]
    assert ends == sorted(set(ends)) and ends[-1] == len(heights) - 1
    at_peak = next(title for title, _, end in drawn["phases"] if drawn["peak"] <= end)
    assert at_peak == words.step_title(answer["peak"]["step"], answer["peak"]["phase"])


def test_the_timeline_has_where_a_card_ends_that_is_near():
    far = estimate({**JOB, "gpu": {"memory_bytes": 1 << 30}})
    spared = far["fits"][0]["limit"] - far["peak"]["reserved"]
    near = estimate({**JOB, "gpu": {"memory_bytes": (1 << 30) - spared}})
    limits = [html.moments(answer, html.timeline(answer))["limit"] for answer in (far, near)]
    assert limits == [None, far["peak"]["reserved"]]


@pytest.mark.parametrize("job", [{"method": "inference"}, {"method": "full", "gradient_checkpointing": True}])
def test_every_kind_of_job_has_a_page(client, job):
    pairs = {**{key: str(value) for key, value in job.items()}, "sequence_length": "32", "config": json.dumps(LLAMA)}
    response = client.post("/", data=pairs, headers={"hx-request": "true"})
    assert response.status_code == 200 and "</svg>Needs " in response.text and "<html" not in response.text
    assert Tags(response.text).open == []


@pytest.mark.parametrize(
    "name, said",
    [
        ("A100-SXM4-80GB", "an A100-SXM4-80GB"),
        ("RTX A6000", "an RTX A6000"),
        ("H100 PCIe 80GB", "an H100 PCIe 80GB"),
        ("GeForce RTX 4090", "a GeForce RTX 4090"),
        ("TITAN RTX", "a TITAN RTX"),
        ("B200", "a B200"),
        ("my card", "my card"),
        ("this machine's NVIDIA H200", "this machine's NVIDIA H200"),
    ],
)
def test_cards_have_their_article(name, said):
    assert words.with_article(name) == said


@pytest.mark.parametrize(
    "count, said",
    [(0, "0"), (512, "0.5 KiB"), (1 << 20, "1.0 MiB"), (100 << 20, "0.10 GiB"), (11 << 30, "11.0 GiB")],
)
def test_sizes_are_said_in_gib(count, said):
    assert words.size(count) == said


# Beside the page.


def test_what_is_alive_after_an_event_is_told_by_module(client):
    answer = client.get("/estimate.json", params=ADDRESS).json()
    peak = max(answer["timeline"]["points"], key=lambda point: point["allocated"])
    told = client.get("/alive", params={**ADDRESS, "event": peak["event"]})
    largest = answer["holders"][0]
    assert told.text.count("<li>") == 6 and f"<b>{words.size(largest['bytes'])}</b>" in told.text
    assert sum(holder["bytes"] for holder in answer["holders"]) <= answer["peak"]["allocated"]
    assert any(".*." in holder["module"] for holder in answer["holders"])
    first = client.get("/alive", params={**ADDRESS, "event": answer["timeline"]["points"][0]["event"]})
    assert first.status_code == 200 and first.text != told.text
    assert "no event" in client.get("/alive", params={**ADDRESS, "event": 10**9}).json()["error"]["message"]


def test_a_link_s_preview_is_a_picture_made_here(client, page):
    meta = {tag.get("property"): tag["content"] for tag in Tags(page).all("meta") if "content" in tag}
    assert meta["og:image"].startswith("http://testserver/picture.png?") and "Tesla T4" in meta["og:image:alt"]
    picture = client.get(meta["og:image"])
    assert picture.headers["content-type"] == "image/png"
    image = Image.open(io.BytesIO(picture.content))
    assert image.size == (1200, 630) and len(image.getcolors()) > 8
    other = client.get("/picture.png", params={**ADDRESS, "gpu": "1GiB", "batch_size": "16"})
    assert other.status_code == 200 and other.content != picture.content
    assert client.get("/picture.png", params={**ADDRESS, "batch_size": "-1"}).status_code == 422


def test_results_stand_side_by_side_by_their_links(client):
    one, two = urlencode(ADDRESS), urlencode({**ADDRESS, "gpu": "1GiB", "batch_size": "16", "sequence_length": "512"})
    address = "/compare?" + urlencode([("job", one), ("job", f"http://testserver/?{two}#result")])
    text = client.get(address).text
    assert Tags(text).open == [] and "Fits a Tesla T4" in text and "Does not fit a card of" in text
    for size in (client.get(f"/estimate.json?{job}").json()["peak"]["allocated"] for job in (one, two)):
        assert f"<td>{words.size(size)}</td>" in text
    links = [link["href"] for link in Tags(text).all("a")]
    assert f"/?{one}" in links and f"/?{two}" in links
    assert "Does not fit" not in client.get([link for link in links if link.startswith("/compare?")][-1]).text
    (asked,) = (link for link in links if link.startswith("/compare.json?"))
    rows = client.get(asked).json()["rows"]
    assert [row["verdict"] for row in rows] == ["fits", "does_not_fit"]


def test_a_link_that_is_none_is_told_and_the_others_stay(client):
    one = urlencode(ADDRESS)
    wrong = client.get("/compare", params=[("job", one), ("job", "my result")])
    assert wrong.status_code == 422 and "is no link of a result" in wrong.text and "Fits a Tesla T4" in wrong.text
    many = client.get("/compare", params=[("job", one)] * 7)
    assert many.status_code == 422 and "too many" in many.text
    bad = client.get("/compare", params=[("job", one), ("job", urlencode({**ADDRESS, "gpu": "t44"}))])
    assert bad.status_code == 200 and "no GPU called" in bad.text
    assert client.get("/compare").status_code == 200
    assert client.get("/compare.json", params={"job": "my result"}).json()["error"]["field"] == "job"


def test_the_page_of_accuracy_has_every_row_with_its_error(client):
    page, tables = client.get("/accuracy").text, client.get("/accuracy.json").json()
    assert Tags(page).open == [] and set(tables) >= {"h200", "h100", "architectures", "settings", "frontiers"}
    for name, table in tables.items():
        for row in table["rows"]:
            at = page.index(f'<th scope="row">{row["id"]}</th>', page.index(f'id="t-{name}"'))
            line = page[at : page.index("</tr>", at)]
            if name == "frontiers":
                assert f"<td>{row['planned']}</td><td>{row['measured']}</td>" in line
            else:
                planned, measured = row["peak_allocated"]
                assert f">{abs(planned / measured - 1) * 100:.3f} %</td>" in line


def test_how_it_works_shows_a_real_plan(client, monkeypatch, answer):
    monkeypatch.setattr(runner.RequestRunner, "plan", lambda *_, **__: asyncio.sleep(0, answer))
    page = client.get("/how-it-works").text
    assert Tags(page).open == [] and page.count('class="time"') == 1 and 'class="bar"' in page
    assert words.size(answer["peak"]["allocated"]) in page and "/accuracy" in page
