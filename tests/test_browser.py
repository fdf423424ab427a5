"""The page in a real Chromium (/usr/bin/chromium, which .ci/run installs): alive, quick, accessible, and quiet.

What is expected is waited for; a bound of time is one for what never comes, or is measured against the machine's own.
"""

import json
import os
import re
import statistics
import threading
import time
from urllib.parse import urlencode, urlsplit

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright
from tiny import LLAMA
from vramplan.render import words
from vramplan.server import app as web

CHROMIUM = "/usr/bin/chromium"
PATIENCE = 240_000
"""Milliseconds in which what is expected must have come: a bound for what never comes, not for speed."""
ADDRESS = {"model": "pythia-70m", "method": "lora", "gpu": "t4", "batch_size": "1", "sequence_length": "64"}

CHARTS = """
window.charts = [];
let made;
Object.defineProperty(window, "uPlot", {
  get: () => made,
  set: (uPlot) => (made = new Proxy(uPlot, {
    construct(_, given) {
      const chart = new uPlot(...given);
      charts.push(chart);
      (chart.hooks.destroy ??= []).push(() => charts.splice(charts.indexOf(chart), 1));
      return chart;
    },
  })),
});
"""
"""The timelines that a page has drawn and not given up, as `charts`."""


@pytest.fixture(scope="module")
def server():
    config = uvicorn.Config(web.create_app(), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no {CHROMIUM}: .ci/run installs it")
    expect.set_options(timeout=PATIENCE)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, server):
    """Open a tab with these options; in the end no request left for another host, and nothing was refused or thrown."""
    contexts, hosts, complaints = [], set(), []

    def open_tab(**options):
        context = browser.new_context(base_url=server, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(CHARTS)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: "Content Security" in said.text and complaints.append(said.text))
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert hosts <= {urlsplit(server).netloc} and complaints == []


def address(**changes):
    return "/?" + urlencode({**ADDRESS, **changes})


def test_without_javascript_the_form_is_sent_and_answered(tab):
    page = tab(java_script_enabled=False)
    page.goto(address())
    page.get_by_label("Batch size").fill("2")
    page.get_by_role("button", name="Plan", exact=True).click()
    expect(page.locator(".job").first).to_contain_text("batch 2 × 64")
    expect(page).to_have_url(re.compile("batch_size=2"))
    expect(page.locator("table.phases tr.top-row")).to_be_visible()
    for empty in (".time", ".scrub", ".closer"):
        expect(page.locator(empty)).to_be_hidden()
    page.get_by_text("A model of your own").click()
    page.get_by_label("config.json").fill(json.dumps(LLAMA))
    page.get_by_role("button", name="Plan this config").click()
    expect(page.locator(".job").first).to_contain_text("LlamaForCausalLM")


def test_what_is_chosen_before_htmx_is_ready_is_asked_for_when_it_is(tab):
    """htmx begins in a task of its own, which a busy browser runs late."""
    page = tab()
    page.add_init_script("const at = setTimeout; window.setTimeout = (f, ms) => at(f, ms === undefined ? 2000 : ms)")
    page.goto(address())
    page.locator("label", has_text="QLoRA").click()
    assert not page.evaluate("document.getElementById('job')._htmx?.initialized")
    expect(page.locator(".job").first).to_contain_text("qlora")


def test_typing_replaces_the_answer_and_the_address(tab):
    page = tab()
    page.goto(address())
    before = page.locator(".peaks").inner_text()
    page.get_by_label("Batch size").fill("3")
    expect(page.locator(".job").first).to_contain_text("batch 3 × 64")
    expect(page).to_have_url(re.compile("batch_size=3"))
    expect(page.locator(".peaks")).not_to_have_text(before, use_inner_text=True)
    expect(page).to_have_title(re.compile("^" + re.escape(page.locator("h1").inner_text().replace("\u00a0", " "))))
    shown = page.locator("#result").inner_text()
    page.reload()
    expect(page.locator("#result")).to_have_text(shown, use_inner_text=True)
    page.locator("label", has_text="QLoRA").click()
    expect(page.locator(".job").first).to_contain_text("qlora")
    expect(page).to_have_url(re.compile("method=qlora"))
    page.go_back()
    # The document is loaded anew; until its stylesheet is there, its text is that of what is hidden, too.
    expect(page.locator("#result")).to_have_text(shown, use_inner_text=True)
    expect(page.get_by_label("Batch size")).to_have_value("3")
    page.go_forward()
    expect(page.locator(".job").first).to_contain_text("qlora")
    expect(page.get_by_label("QLoRA")).to_be_checked()


def test_the_last_thing_typed_wins(tab):
    page = tab()
    page.goto(address())
    page.route("**/?*batch_size=5*", lambda route: None)  # the answer to this one never comes
    with page.expect_request("**/?*batch_size=5*"):
        page.get_by_label("Batch size").fill("5")
    with page.expect_event("requestfailed", lambda request: "batch_size=5" in request.url):
        page.get_by_label("Batch size").fill("6")
    expect(page.locator(".job").first).to_contain_text("batch 6 × 64")
    expect(page).to_have_url(re.compile("batch_size=6"))


def test_what_is_being_done_is_said_and_can_be_cancelled(tab):
    page = tab()
    page.goto(address())
    said = {"state": "running", "line": 0, "doing": "the first step", "seconds": 1}
    page.route("**/?*batch_size=5*", lambda route: None)
    page.route("**/progress/*", lambda route: route.fulfill(json=said))
    with page.expect_request("**/progress/*") as followed, page.expect_request("**/?*batch_size=5*") as asked:
        page.get_by_label("Batch size").fill("5")
    assert followed.value.url.endswith("/" + asked.value.headers["x-request-id"])
    expect(page.locator("#doing")).to_have_text("The first step")
    expect(page.locator("#elapsed")).to_have_text(re.compile(r"\d s"))
    with page.expect_event("requestfailed", lambda request: "batch_size=5" in request.url):
        page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#announce")).to_contain_text("Cancelled")
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.get_by_label("Batch size")).to_have_value("5")
    expect(page.locator(".job").first).to_contain_text("batch 1 × 64")


def test_advice_comes_by_itself_and_an_edit_ends_it(tab):
    page = tab()
    page.route("**/advice/*", lambda route: None)
    page.route("**/progress/*", lambda route: route.fulfill(json={"state": "done"}))
    with page.expect_request("**/advice/changes?*"):
        page.goto(address(gpu="1GiB", batch_size="16", sequence_length="512"))
    expect(page.locator("#advice")).to_have_attribute("aria-busy", "true")
    with page.expect_event("requestfailed", lambda request: "/advice" in request.url):
        page.get_by_label("Batch size").fill("15")
    expect(page.locator(".job").first).to_contain_text("batch 15 × 512")
    with page.expect_request("**/advice/changes?*batch_size=15*"):
        pass
    expect(page.locator("#announce")).to_contain_text("Does not fit")


def test_advice_that_does_not_come_says_why_and_can_be_asked_for_again(tab):
    page = tab()
    why = {"error": {"message": "too many jobs are waiting here", "hint": ""}}
    page.route("**/advice/*", lambda route: route.fulfill(status=503, json=why))
    page.goto(address())
    expect(page.locator("#advice")).to_contain_text("could not be worked out: too many jobs are waiting here.")
    page.unroute("**/advice/*")
    page.route("**/advice/*", lambda route: None)
    page.route("**/progress/*", lambda route: route.fulfill(json={"state": "done"}))
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#advice")).to_contain_text("Stopped.")
    page.unroute("**/advice/*")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#advice .largest li a").first).to_be_visible()
    expect(page.locator("#advice [data-ask]")).to_have_count(0)
    expect(page.locator("#announce")).to_have_text("How far it goes: done.")


def test_an_error_appears_at_its_field_as_one_types_and_goes_again(tab):
    page = tab()
    page.goto(address())
    box = page.get_by_label("Batch size")
    box.fill("-1")
    expect(page.locator("#e-batch_size")).to_have_text("Batch size takes a whole number from 1 on, not -1")
    expect(box).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#announce")).to_contain_text("Cannot say")
    box.fill("1")
    expect(page.locator("h1")).to_contain_text("Fits")
    expect(page.locator("#e-batch_size")).to_be_empty()
    expect(box).not_to_have_attribute("aria-invalid", "true")


def test_a_pasted_config_is_planned_as_one_types(tab):
    page = tab()
    page.goto(address())
    page.get_by_text("A model of your own").click()
    page.get_by_label("config.json").fill(json.dumps(LLAMA))
    expect(page.locator(".job").first).to_contain_text("LlamaForCausalLM")
    expect(page).to_have_url(re.compile(re.escape("config=%7B%22")))
    page.get_by_label("or a file").set_input_files(
        {"name": "config.json", "mimeType": "application/json", "buffer": b"{"}
    )
    expect(page.locator("#e-config")).to_contain_text("not JSON")
    expect(page.get_by_label("config.json")).to_have_value("{")
    expect(page.get_by_label("Length", exact=True)).to_have_value("64")


MISFIT = {
    "config": json.dumps(LLAMA),
    "method": "full",
    "gpu": "590MiB",
    "batch_size": "64",
    "sequence_length": "64",
}


def test_advice_is_listed_in_place(tab):
    page = tab()
    page.goto("/?" + urlencode(MISFIT))
    expect(page.locator("#advice .changes li").first).to_be_visible()
    expect(page.locator("#advice [data-ask]")).to_have_count(0)
    expect(page).to_have_url(re.compile("sequence_length=64$"))
    page.locator("#advice .changes a").first.click()
    expect(page.locator("h1")).to_contain_text(re.compile("Fits|Tight"))


def test_without_javascript_advice_is_a_link(tab):
    page = tab(java_script_enabled=False)
    page.goto("/?" + urlencode(MISFIT))
    expect(page.get_by_text("is the largest batch")).to_be_hidden()
    page.locator("a.ask").click()
    expect(page.locator("#advice .changes li").first).to_be_visible()
    expect(page.get_by_text("the largest batch")).to_be_visible()


def test_a_hub_that_does_not_answer_is_told_where_models_are_sought(tab):
    page = tab()
    page.goto(address())
    rows = [{"id": "gpt2", "source": "catalogue", "parameters": 124439808, "model_type": "gpt2", "aliases": []}]
    page.route("**/models?*", lambda route: route.fulfill(json=rows, headers={"hub-search": "unanswered"}))
    page.get_by_label("Model", exact=True).press_sequentially("x")
    expect(page.get_by_role("listbox", name="Suggestions")).to_contain_text("The Hub does not answer")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#l-model [aria-selected=true]")).to_contain_text("gpt2")


def test_the_timeline_says_what_is_alive_by_keyboard_and_by_pointer(tab):
    page = tab()
    page.goto(address())
    slider, readout = page.get_by_label("Moment of the step"), page.locator(".readout")
    at_peak = readout.inner_text()
    slider.focus()
    page.keyboard.press("Home")
    expect(readout).to_contain_text("Load, in gpt_neox")
    said = readout.inner_text()
    assert "weights" in said
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^" + re.escape(said.splitlines()[0])))
    expect(readout.get_by_role("list", name="By module")).to_contain_text("of gpt_neox")
    page.locator(".time .u-over").hover(position={"x": 300, "y": 100})
    expect(readout).not_to_have_text(said, use_inner_text=True)
    expect(readout).to_contain_text(re.compile("step, (forward|backward)"))
    assert slider.input_value() == str(page.evaluate("charts[0].posToIdx(300)"))
    page.locator("h1").hover()
    expect(readout).to_have_text(at_peak, use_inner_text=True)
    assert page.evaluate("charts[0].cursor.left") == pytest.approx(page.evaluate(PEAK_AT), abs=0.5)


def test_a_finger_leaves_what_it_found(tab):
    page = tab(has_touch=True, viewport={"width": 390, "height": 844})
    page.goto(address())
    page.locator(".time .u-over").tap(position={"x": 100, "y": 100})
    said = f"charts[0].posToIdx(100) == {page.get_by_label('Moment of the step').input_value()}"
    assert page.evaluate(said) and page.evaluate("charts[0].cursor.left") == pytest.approx(100, abs=5)
    expect(page.locator(".readout")).to_contain_text("First step, ")


MOMENTS = "JSON.parse(document.querySelector('.time').dataset.moments)"
PEAK_AT = f"(({{event, peak}}) => charts[0].valToPos(event[peak], 'x'))({MOMENTS})"
SAID = """
async (bytes) => {
  const box = document.querySelector(".time"), same = bytes.map(() => ""), scrub = document.querySelector(".scrub");
  box.dataset.moments = JSON.stringify({
    kinds: [["weights", "weights"]], alive: [bytes], event: [...bytes.keys()], module: same, reserved: bytes,
    phases: [["Load", "load", bytes.length - 1]], peak: 0, limit: null,
  });
  document.dispatchEvent(new Event("htmx:after:swap"));
  await new Promise(requestAnimationFrame);
  return bytes.map((_, i) => {
    scrub.value = i;
    scrub.dispatchEvent(new Event("input"));
    return document.querySelector(".readout p").textContent.split(":")[0];
  });
}
"""
"""What the readout makes of each of some amounts."""


def test_the_timeline_says_sizes_as_all_the_rest_does(tab):
    page = tab()
    page.goto(address())
    page.route("**/alive?*", lambda route: route.abort())
    edges = [unit * count for unit in (1 << 10, 1 << 20, 1 << 30) for count in (1, 1.25, 9.99, 10, 10.25, 99.95, 100)]
    sizes = [0, 256, 768, 1 << 29, 9 << 27, 11 << 27] + [
        int(largest_fitting) + more for largest_fitting in edges for more in (-1, 0, 1)
    ]
    assert page.evaluate(SAID, sizes) == [words.size(size) for size in sizes]


DRAWN = """
() => {
  const [chart] = charts, { ctx } = chart, style = getComputedStyle(document.querySelector(".time"));
  const { kinds, alive, event, phases } = MOMENTS;
  const at = (x, y) => [chart.valToPos(x, "x", true), chart.valToPos(y, "y", true)].map(Math.round);
  const shown = (pixel) => "#" + [...pixel].slice(0, 3).map((part) => part.toString(16).padStart(2, "0")).join("");
  const found = {};
  kinds.forEach(([kind], k) => {
    const edge = (i) => phases.some(([, , end]) => Math.abs(at(event[i], 0)[0] - at(event[end], 0)[0]) < 6);
    const sure = (i) => (edge(i) ? 0 : Math.min(...[i - 1, i, i + 1].map((near) => alive[k][near] ?? 0)));
    const moment = event.reduce((best, _, i) => (sure(i) > sure(best) ? i : best), 0);
    const below = alive.slice(0, k).reduce((sum, column) => sum + column[moment], 0);
    const [x, bottom] = at(event[moment], below), [, top] = at(event[moment], below + alive[k][moment]);
    if (bottom - top < 8) return;
    const pixels = [...Array(bottom - top - 4).keys()].map((y) => ctx.getImageData(x, top + 2 + y, 1, 1).data);
    const right = pixels.filter((pixel) => shown(pixel) === style.getPropertyValue(`--k-${kind}`));
    found[kind] = right.length / pixels.length;
  });
  const { width, top } = chart.bbox;
  const letters = ctx.getImageData(0, 0, width, top).data.filter((_, i, all) => i % 4 === 0 && all[i + 3] > 200);
  const mean = letters.reduce((sum, part) => sum + part, 0) / letters.length;
  return { found, ink: letters.length > 50 ? mean : null, weights: style.getPropertyValue("--k-weights") };
}
""".replace("MOMENTS", MOMENTS)
"""Of each kind that is high enough somewhere between the phases' edges, the share of its height that has the
stylesheet's colour; how light the letters above the plot are; and what colour weights have."""


def assert_drawn(page):
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    drawn = page.evaluate(DRAWN)
    assert_right(drawn)
    return drawn


def assert_right(drawn):
    assert {"weights", "kernel_workspace"} <= set(drawn["found"])
    assert all(share > 0.7 for share in drawn["found"].values()), drawn


@pytest.mark.parametrize("width, density", [(1440, 1), (390, 3)])
def test_the_timeline_has_the_colours_of_the_scheme_and_follows_its_window(tab, width, density):
    page = tab(viewport={"width": width, "height": 900}, device_scale_factor=density, color_scheme="light")
    page.goto(address())
    by_day = assert_drawn(page)
    page.emulate_media(color_scheme="dark")
    by_night = assert_drawn(page)
    assert by_day["weights"] != by_night["weights"] and by_day["ink"] < 80 < 180 < by_night["ink"] < 250
    page.emulate_media(forced_colors="active")
    assert assert_drawn(page)["ink"] > 250
    page.emulate_media(forced_colors="none")
    for wide in (width, 700):
        page.set_viewport_size({"width": wide, "height": 900})
        fills = "([chart]) => chart.ctx.canvas.clientWidth === document.querySelector('.time').clientWidth"
        page.wait_for_function(f"() => ({fills})(charts)")
        sizes = page.evaluate("(({width, clientWidth}) => [width, clientWidth])(charts[0].ctx.canvas)")
        assert sizes[0] == sizes[1] * density
        assert_drawn(page)


VIEW = "(({min, max}) => [min, max])(charts[0].scales.x)"


def test_a_stretch_of_the_timeline_is_drawn_larger_and_all_of_it_again(tab):
    page = tab()
    page.goto(address())
    whole, picture = page.evaluate(VIEW), page.evaluate("charts[0].ctx.canvas.toDataURL()")
    slider, show_all = page.get_by_label("Moment of the step"), page.get_by_role("button", name="Show all")
    moments = slider.get_attribute("max")
    expect(show_all).to_be_hidden()

    def drag():
        wanted = page.evaluate("[100, 250].map((x) => charts[0].posToVal(x, 'x'))")
        over = page.locator(".time .u-over")
        over.hover(position={"x": 100, "y": 60})
        page.mouse.down()
        over.hover(position={"x": 250, "y": 80})
        page.mouse.up()
        expect(show_all).to_be_visible()
        assert page.evaluate(VIEW) == pytest.approx(wanted, rel=0.01)
        assert page.evaluate("charts[0].ctx.canvas.toDataURL()") != picture
        low, high = (int(slider.get_attribute(bound)) for bound in ("min", "max"))
        assert 0 < low < high < int(moments)

    drag()
    slider.focus()
    page.keyboard.press("Home")
    page.locator("h1").hover()
    assert int(slider.input_value()) == int(slider.get_attribute("min"))
    expect(page.locator(".readout")).to_contain_text("step")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(show_all).to_be_focused()
    page.keyboard.press("Enter")
    expect(show_all).to_be_hidden()
    expect(slider).to_be_focused()
    assert page.evaluate(VIEW) == whole and slider.get_attribute("max") == moments
    page.locator("h1").hover()
    assert page.evaluate("charts[0].ctx.canvas.toDataURL()") == picture
    drag()
    page.locator(".time .u-over").dblclick(position={"x": 200, "y": 60})
    expect(show_all).to_be_hidden()
    assert page.evaluate(VIEW) == whole
    slider.focus()
    page.keyboard.press("End")
    closer = page.get_by_role("button", name="Zoom in")
    closer.focus()
    page.keyboard.press("Enter")
    low, high = page.evaluate(VIEW)
    assert high == whole[1] and high - low == pytest.approx((whole[1] - whole[0]) / 2)
    for _ in range(12):
        page.keyboard.press("Enter")
    expect(closer).to_be_disabled()


@pytest.mark.parametrize("place", ["/how-it-works", address()])
def test_a_page_has_one_timeline(tab, place):
    page = tab()
    page.goto(place)
    expect(page.locator(".time canvas")).to_have_count(1)
    assert page.evaluate("charts.length") == 1
    page.get_by_label("Moment of the step").press("Home")
    expect(page.locator(".readout p")).to_contain_text("Load")


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_in_either_light(tab, width, scheme):
    page = tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(address())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3)"
    )
    assert (ink < 80 and paper > 200) if scheme == "light" else (ink > 200 and paper < 80)


def test_a_keyboard_reaches_the_answer_first(tab):
    page = tab()
    page.goto(address())
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the answer")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#result")).to_be_focused()


FOCUS = """
() => {
  const it = document.activeElement;
  if (it === document.body) return ["", true];
  const style = getComputedStyle(it.matches(".segmented input") ? it.nextElementSibling : it);
  const name = it.id || it.ariaLabel || it.textContent.trim();
  return [name, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0];
}
"""
"""What has the focus, and whether that is seen."""


def test_by_keyboard_alone_a_job_is_asked_and_its_answer_read(tab):
    page = tab()
    page.goto(address())
    expect(page.locator("#advice [data-ask]")).to_have_count(0)
    seen = []
    while not seen or (seen[-1][0] and len(seen) < 200):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUS))
    assert [name for name, visible in seen if not visible] == []
    order = [name for name, _ in seen]
    wanted = ["f-model", "f-method-lora", "f-gpu", "f-batch_size", "f-sequence_length", "Plan", "Training"]
    found = [order.index(name) for name in wanted]
    assert found == sorted(found) and order.index("The phases as a table") > found[-1]
    page.get_by_label("Model", exact=True).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("pythia-160")
    expect(page.locator("#l-model [data-value]").first).to_contain_text("pythia-160m")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".job").first).to_contain_text("pythia-160m")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".job").first).to_contain_text("full · batch 1 × 64")
    page.locator("summary", has_text="The phases as a table").focus()
    page.keyboard.press("Enter")
    expect(page.locator("table.phases")).to_be_visible()
    page.get_by_role("checkbox", name="gpt_neox.layers").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("row", name=re.compile("^mlp.dense_h_to_4h"))).to_be_visible()


def test_behind_the_pictures_are_tables(tab):
    """Every moment of both steps by kind, and every module with what it weighs and keeps either way."""
    page = tab()
    page.goto(address())
    drawn = page.evaluate(f"{MOMENTS}.phases.map(([step, phase]) => [step, phase])")
    rows = page.locator("table.phases tbody tr").all()
    assert [[row.locator("th").text_content(), row.locator("td").first.text_content()] for row in rows] == drawn
    assert [step for step, _ in drawn] == ["Load"] + ["First step"] * 3 + ["Steady step"] * 3
    kinds = page.locator("table.phases thead th").all_text_contents()
    assert {"Weights", "Adapters", "Activations", "Gradients", "Optimizer state"} <= set(kinds)
    columns = page.locator("table.layers thead th").all_text_contents()
    assert columns == ["Module", "Parameters", "Weights", "Weights as NF4", "as NF4, double", "Adapters",
                       "Gradients", "Optimizer", "Activations", "Activations, checkpointed"]  # fmt: skip
    together = page.locator("table.layers tfoot td").all_text_contents()
    assert all(re.fullmatch(r"[\d.]+ [KMG]iB", cell) for cell in together[1:])


def test_results_are_added_side_by_side_by_their_links(tab):
    page = tab()
    page.goto(address())
    link = page.url
    page.get_by_role("link", name="beside another").click()
    for method in ("qlora", "full"):
        page.get_by_label("Link of another result").fill(link.replace("method=lora", f"method={method}"))
        page.get_by_role("button", name="Add").click()
        expect(page.locator("table.compare tr.asked td").last).to_contain_text(method)
    expect(page.locator("table.compare thead a")).to_have_count(3)
    expect(page.locator("table.compare tr.said strong")).to_have_text([re.compile("Fits a Tesla T4")] * 3)
    page.get_by_role("link", name="Take away 2").click()
    expect(page.locator("table.compare tr.asked td")).to_have_text([re.compile("^lora"), re.compile("^full")])


def test_on_paper_is_the_answer_without_the_form(tab):
    page = tab(viewport={"width": 794, "height": 1123}, color_scheme="dark")
    page.goto(address())
    expect(page.locator("#advice [data-ask]")).to_have_count(0)
    assert assert_drawn(page)["ink"] > 180
    page.evaluate(f"addEventListener('beforeprint', () => (window.printed = ({DRAWN})()))")
    page.pdf()
    printed = page.evaluate("printed")
    assert_right(printed)
    assert printed["ink"] < 80 < 180 < assert_drawn(page)["ink"]
    page.emulate_media(media="print")
    box = page.locator(".time canvas").bounding_box()
    assert box["width"] <= 794 and box["height"] > 150
    for kept in ("h1", ".bar", ".time canvas", "table.layers .inside >> nth=0"):
        expect(page.locator(kept).first).to_be_visible()
    for left in ("#job", ".scrub", ".top nav", ".time .u-over"):
        expect(page.locator(left)).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 794


# Quick.

TO_PAINT = """
async ([id, value]) => {
  const box = document.getElementById(id);
  const swapped = new Promise((done) => document.addEventListener("htmx:after:swap", done, { once: true }));
  const start = performance.now();
  box.value = value;
  box.dispatchEvent(new Event("input", { bubbles: true }));
  await swapped;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - start;
}
"""
"""Type a value; milliseconds until the answer to it is painted."""


def slowdown():
    """How much longer this machine takes now than it works: 1 where nothing else runs."""
    wall, worked = time.perf_counter(), time.process_time()
    while time.process_time() - worked < 0.1:
        pass
    return (time.perf_counter() - wall) / (time.process_time() - worked)


def test_a_warm_change_is_painted_within_150_ms(tab):
    """Of some rounds the best: each is the median of five changes, in the time of a machine that does nothing else."""
    page = tab()
    page.goto(address(gpu="a100-80gb"))
    sizes = iter(range(2, 200))
    for _ in range(4):  # until one profile serves all
        page.evaluate(TO_PAINT, ["f-batch_size", str(next(sizes))])
    rounds = []
    for _ in range(12):
        before = slowdown()
        took = statistics.median(page.evaluate(TO_PAINT, ["f-batch_size", str(next(sizes))]) for _ in range(5))
        rounds.append(took / max(1, (before + slowdown()) / 2))
        if rounds[-1] <= 150:
            break
    assert min(rounds) <= 150, rounds
    expect(page.locator(".job").first).to_contain_text(f"batch {next(sizes) - 1} × 64")


CHANGES = """
async (changes) => {
  for (const [id, value] of changes) {
    const field = document.getElementById(id);
    if (field.type === "radio") field.click();
    else {
      field.value = value;
      field.dispatchEvent(new Event(field.role === "combobox" ? "change" : "input", { bubbles: true }));
    }
    await new Promise((next) => setTimeout(next, Math.random() * 40));
  }
}
"""


def test_after_two_hundred_quick_changes_the_last_one_s_answer_stands(tab):
    page = tab()
    said = []
    page.on("console", lambda message: message.type == "error" and said.append(message.text))
    cards = {"a100-80gb": "an A100-SXM4-80GB", "24GiB": "a card of 24\u00a0GiB"}
    for method in ("full", "lora"):
        for size in (1, 2, 3, 1):  # until one profile serves all
            page.goto(address(gpu="a100-80gb", method=method, batch_size=size, sequence_length=32 * size))
    changes = []
    for turn in range(40):
        changes += [
            ("f-batch_size", str(1 + turn % 7)),
            ("f-method-full" if turn % 2 else "f-method-lora", None),
            ("f-sequence_length", str(32 * (1 + turn % 3))),
            ("f-gpu", [*cards][turn % 2]),
            ("f-batch_size", str(2 + turn % 5)),
        ]
    assert len(changes) == 200
    page.evaluate(CHANGES, changes)
    expect(page.locator("h1")).to_contain_text(f"Fits {cards['24GiB']}")
    expect(page.locator(".job").first).to_contain_text("full · batch 6 × 32")
    expect(page).to_have_url(re.compile("method=full&gpu=24GiB&batch_size=6&sequence_length=32$"))
    expect(page.locator("#result")).not_to_have_attribute("aria-busy", "true")
    assert page.locator(".job").first.inner_text().count("batch 6 × 32") == 1
    assert page.evaluate("charts.length") == page.locator(".time canvas").count() == 1
    assert page.evaluate(f"charts[0].data.at(-2).join() === {MOMENTS}.reserved.join()")
    drawn = page.evaluate("charts[0].ctx.canvas.toDataURL()")
    shown = page.locator("#result").inner_text()
    page.reload()
    expect(page.locator("#result")).to_have_text(shown, use_inner_text=True)
    assert page.evaluate("charts[0].ctx.canvas.toDataURL()") == drawn
    assert said == []


@pytest.mark.parametrize("width", [390, 1440])
def test_the_first_screen_is_small_and_does_not_move(tab, width):
    page = tab(viewport={"width": width, "height": 900})
    page.add_init_script(
        "window.shift = 0; new PerformanceObserver((list) => list.getEntries().forEach("
        "(entry) => { if (!entry.hadRecentInput) window.shift += entry.value; }))"
        ".observe({ type: 'layout-shift', buffered: true });"
    )
    page.goto(address())
    page.evaluate("document.fonts.ready")
    sent = page.evaluate(
        "['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))"
        ".map((entry) => [entry.name, entry.transferSize])"
    )
    assert all(size for name, size in sent), sent
    assert sum(size for _, size in sent) <= 250_000, sent
    page.evaluate(TO_PAINT, ["f-batch_size", "2"])
    assert page.evaluate("window.shift") < 0.1
    for asked in (address(), "/?" + urlencode(MISFIT)):
        page.goto(asked)
        expect(page.locator("#advice [data-ask]")).to_have_count(0)
        assert page.evaluate("window.shift") < 0.1


# For everybody.

PAGES = {
    "fits": address(),
    "does not fit": address(gpu="1GiB", batch_size="16", sequence_length="512"),
    "error": address(batch_size="-1"),
    "compare": "/compare?" + urlencode([("job", address()[2:]), ("job", address(gpu="1GiB", batch_size="16")[2:])]),
    "nothing to compare": "/compare?job=nothing",
    "accuracy": "/accuracy",
    "how it works": "/how-it-works",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(tab, name, scheme):
    page = tab(color_scheme=scheme, reduced_motion="reduce")
    page.goto(PAGES[name])
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


HOSTILE = {
    "broken": ('{"model_type": "llama",', "not JSON"),
    "no object": ("[1, 2]", "no JSON object"),
    "deep": ("[" * 50_000 + "]" * 50_000, "nested too deeply"),
    "endless": (json.dumps({**LLAMA, "num_hidden_layers": 10**12}), "num_hidden_layers"),
    "markup": (json.dumps({**LLAMA, "model_type": "<img src=x onerror=alert(1)>"}), "<img src=x"),
    "huge": (json.dumps({**LLAMA, "id2label": {str(i): "x" * 1000 for i in range(5000)}}), "more than"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_that_cannot_be_is_an_error_at_its_field(tab, name):
    text, message = HOSTILE[name]
    page = tab()
    page.goto(address(batch_size="3"))
    page.get_by_text("A model of your own").click()
    box = page.get_by_label("config.json")
    box.evaluate("(box, text) => { box.value = text; box.dispatchEvent(new Event('input', {bubbles: true})); }", text)
    expect(page.locator("#e-config")).to_contain_text(message)
    expect(box).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#announce")).not_to_be_empty()
    expect(page.get_by_label("Batch size")).to_have_value("3")
    expect(page.get_by_label("Model", exact=True)).to_have_value("pythia-70m")
    assert re.sub(r"\s", "", box.input_value()) == re.sub(r"\s", "", text)
    box.fill("")
    expect(page.locator("h1")).to_contain_text("Fits")
    expect(page.locator("#e-config")).to_be_empty()
