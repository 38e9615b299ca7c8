"""A headless Chromium for tests of the report: what a page looks like to a browser, and what it asks the network for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POLICY = re.compile(r"default-src 'none'(; script-src[^;\"]*)?")
PROBE = """<script>
addEventListener('load', () => {
  const seen = {
    images: [...document.images].map(image => [image.naturalWidth, image.naturalHeight, image.clientWidth]),
    requests: performance.getEntriesByType('resource').map(entry => entry.name),
    width: document.documentElement.scrollWidth, view: innerWidth,
    headline: document.querySelector('h1').innerText,
  };
  const out = parent === window ? document : parent.document;
  const place = out.createElement('pre');
  place.id = 'probe';
  place.textContent = JSON.stringify(seen);
  out.body.append(place);
});
</script>"""


def printed(page: str, folder: Path) -> Path:
    """The page as the browser prints it, a PDF."""
    (folder / "printed.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    command = [str(CHROMIUM), *options, "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"]
    target = folder / "printed.pdf"
    command += ["--no-pdf-header-footer", f"--print-to-pdf={target}", (folder / "printed.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return target


def probe(page: str, folder: Path, *, width: int | None = None) -> dict[str, Any]:
    """Open a copy of the page with a probe in it and return what the probe saw; in a frame where `width` is given.

    The copy's security policy allows the probe's script and nothing else that the page's own did not.
    """
    copy, policies = POLICY.subn("default-src 'none'; script-src 'unsafe-inline'", page)
    if policies != 1:
        raise AssertionError(f"the page has {policies} security policies, not one")
    copy = copy.replace("</body>", PROBE + "</body>")
    if width is not None:
        # A window is at least some 500 pixels wide in headless mode; a frame is as narrow as it is told to be.
        copy = f'<!doctype html><iframe style="width:{width}px;height:900px;border:0" srcdoc="{escape(copy)}"></iframe>'
    (folder / "page.html").write_text(copy, encoding="utf-8")
    dom = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=5000",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            (folder / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    if found is None:
        raise AssertionError(f"the probe wrote nothing; the browser gave: {dom[-500:]}")
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen
