"""Refuse a built site that fetches anything from elsewhere: scripts, styles, fonts, pictures, frames.

    python docs/site/check.py build/site

Links that a reader may follow are no fetches. Looked at are the attributes and style sheets by which a
browser loads by itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADS = {"src", "srcset", "poster", "data"}  # attributes that load, whichever element has them
LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch", "manifest"}
ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.I)
IN_STYLES = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:https?:)?//[^'\")\s]+)", re.I)


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        values = {name: value or "" for name, value in attrs}
        names = LOADS & values.keys()
        if tag == "link" and LOADING_LINKS & set(values.get("rel", "").lower().split()):
            names = names | {"href"}
        if tag in ("image", "use"):  # of SVG
            names = names | ({"href", "xlink:href"} & values.keys())
        self.found += [values[name] for name in names if ELSEWHERE.match(values[name])]
        self.found += IN_STYLES.findall(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._style:
            self.found += IN_STYLES.findall(data)

    def handle_endtag(self, tag: str) -> None:
        self._style = False


def fetched(text: str, suffix: str) -> list[str]:
    """Addresses elsewhere that a browser would fetch for a page, a drawing or a style sheet."""
    if suffix == ".css":
        return IN_STYLES.findall(text)
    parser = _Loads()
    parser.feed(text)
    return parser.found


def check(site: Path) -> Iterator[str]:
    """Each fetch from elsewhere, with its file."""
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            yield from (f"{path.relative_to(site)} fetches {url}" for url in fetched(text, path.suffix))


def main() -> int:
    site = Path(sys.argv[1])
    if not (site / "index.html").is_file():
        print(f"there is no site in {site}; build it first", file=sys.stderr)
        return 2
    found = list(check(site))
    print("\n".join(found) or f"{site}: nothing is fetched from elsewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
