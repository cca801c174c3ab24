"""The site of docs/ builds without a warning, holds every page, and asks nothing of anybody else."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser import open_browser
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

pytest.importorskip("mkdocs", reason="the site is built with peerturb[docs]")


def build(out: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Build the site strictly."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out), *flags],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


def test_every_page_is_there_and_can_be_reached(site: Path) -> None:
    pages = {path.with_suffix(".html").name for path in (REPOSITORY / "docs").glob("*.md")}
    assert pages <= {path.name for path in site.glob("*.html")}
    menu = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}"' in menu for page in pages - {"index.html"})


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    asked = []
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:link|script|img|iframe|source|object|video|audio)\b[^>]*>", text)
        assert tags, f"{page.name} has no style"
        asked += [tag for tag in tags if re.search(r"""(?:href|src|data)=["']?(?:https?:)?//""", tag)]
        asked += re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*", text)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        asked += re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)"']*""", text)
    assert asked == []


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: pytest shows it otherwise."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback; give its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(site: Path, tmp_path: Path, width: int) -> None:
    with served(site) as address, open_browser(tmp_path) as browser:
        for page in ("index", "quickstart", "faq", "tuning"):
            browser.requests()
            browser.open(f"{address}/{page}.html", width=width)
            asked = [url for url in browser.requests() if url.startswith(("http:", "https:"))]
            assert asked, "the page itself"
            assert all(url.startswith(address) for url in asked), "nothing from elsewhere"
            assert browser.complaints() == []
            overhang = browser.run("return document.documentElement.scrollWidth - innerWidth")
            assert overhang <= 0, f"{page} is wider than a window of {width}"


def test_links_out_of_the_folder_become_text(site: Path) -> None:
    text = (site / "operating.html").read_text(encoding="utf-8")
    assert "../deploy" not in text
    assert "deploy/prometheus" in text


def test_a_dead_link_ends_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Home\n\n[away](nowhere.md)\n", encoding="utf-8")
    settings = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    settings = settings.partition("\nnav:\n")[0].replace("docs_dir: docs", f"docs_dir: {docs}")
    config = tmp_path / "mkdocs.yml"
    config.write_text(settings.replace("scripts/site_hooks.py", str(REPOSITORY / "scripts" / "site_hooks.py")))
    done = build(tmp_path / "out", "--config-file", str(config))
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
