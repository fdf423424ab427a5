"""Take the pictures of the page in docs/screenshots: five states, at 1440 and 390 pixels, by day and by night.

    python docs/screenshots.py [NAME …]

Wants /usr/bin/chromium, as the tests of the page do.
"""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from urllib.parse import urlencode

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright
from vramplan.render.html import EXAMPLES
from vramplan.server import app as web

OUT = Path(__file__).parent / "screenshots"
ON_A_4090 = {**EXAMPLES["8B with QLoRA on a 4090"]}
STATES = {
    "first-visit": "/",
    "fits": "/advice?" + urlencode(ON_A_4090),
    "does-not-fit": "/advice?" + urlencode({**ON_A_4090, "method": "lora", "batch_size": "4"}),
    "error": "/?" + urlencode({**ON_A_4090, "batch_size": "-1"}),
    "compare": "/compare?" + urlencode([("job", urlencode({**ON_A_4090, "method": m})) for m in ("qlora", "lora")]),
}
WINDOWS = {1440: 1000, 390: 844}


def main(names: list[str]) -> None:
    """Take the pictures of these names, or all."""
    server = uvicorn.Server(uvicorn.Config(web.create_app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    OUT.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name in names or STATES:
            for width, height in WINDOWS.items():
                for scheme in ("light", "dark"):
                    window = {"width": width, "height": height}
                    page = browser.new_page(
                        base_url=address, viewport=window, color_scheme=scheme, reduced_motion="reduce"
                    )
                    page.goto(STATES[name], timeout=600_000)
                    page.reload()  # a font that comes late is for the next visit
                    page.locator("#advice [data-ask]").first.wait_for(state="detached", timeout=600_000)
                    page.evaluate("document.fonts.ready")
                    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
                    path = OUT / f"{name}-{width}-{scheme}.webp"
                    picture.convert("RGB").save(path, lossless=True, method=6)
                    print(f"{path}: {path.stat().st_size >> 10} KiB")
                    page.close()
        browser.close()
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
