"""The site as mkdocs builds it: no warning, and every link and anchor inside it leads somewhere."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [given[name] for name in ("href", "src") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_no_link_inside_the_site_is_dead(site, pages):
    assert len(pages) > 25
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":  # the latter's links begin at the address
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                dead.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target.suffix == ".html" and parts.fragment not in pages[target].anchors:
                dead.append(f"{path.relative_to(site)}: no anchor in {link}")
    assert not dead, "\n".join(dead)


def test_the_site_needs_no_other_server(pages):
    """Fonts, styles, scripts and pictures come with it."""
    for path, page in pages.items():
        text = path.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text, path
        assert not [s for s in page.links if s.endswith((".js", ".css", ".png", ".svg")) and urlsplit(s).netloc], path


def test_formulas_are_typeset_on_the_pages_of_the_methods(site):
    for method in ("adjoint_matching", "vgg_flow", "ac_flow", "diffusion_nft", "tafs_grpo"):
        text = (site / method / "index.html").read_text(encoding="utf-8")
        assert text.count('class="arithmatex"') >= 6, method
        assert "katex.min.js" in text
