"""What a browser would make of a page: its tags, its text, and what is not allowed in one."""

import re
from html.parser import HTMLParser

TAGS = "html head meta title style body main nav ol ul li a section h1 h2 h3 h4 p div span b small"
TAGS += " table caption thead tbody tr th td figure figcaption img details summary pre code br"
TAGS += " article dl dt dd sub bdi"
SVG = "svg g defs path use text tspan clippath rect image lineargradient stop"
ALLOWED = frozenset(f"{TAGS} {SVG}".split())
VOID = {"meta", "br", "img"}


class Document(HTMLParser):
    """A parsed page: `text` between the tags, `ids`, and a list of its `faults`."""

    def __init__(self, html: str, allowed=ALLOWED):
        super().__init__()
        self.allowed, self.text, self.ids, self.faults, self._open = allowed, "", [], [], []
        self.anchors, self.policy, self.styles = [], "", ""
        self.feed(html)
        self.close()
        self.faults += [f"never closed: {tag}" for tag in self._open]
        self.faults += [f"id twice: {one}" for one in set(self.ids) if self.ids.count(one) > 1]
        self.faults += [f"no such id: {to}" for to in self.anchors if to not in self.ids]
        self.faults += [f"style: {url}" for url in re.findall(r"url\((?!#)|@import", self.styles)]

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self._open.append(tag)
        if tag not in self.allowed:
            self.faults.append(f"tag: {tag}")
        for name, value in attrs:
            self._attribute(tag, name, value or "")
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"closed out of order: {tag}")
        if tag in ("td", "th", "li"):
            self.text += "\n"

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self.styles += data
        else:
            self.text += data

    def _attribute(self, tag, name, value):
        if name.startswith("on"):
            self.faults.append(f"handler: {name}")
        if name == "id":
            self.ids.append(value)
        if name == "style":
            self.styles += value
        if name in ("href", "src", "xlink:href", "action", "srcset"):
            if value.startswith("#"):
                self.anchors.append(value[1:])
            elif not value.startswith("data:image/"):
                self.faults.append(f"reference: {value}")
        self.anchors += re.findall(r"url\(#([^)]+)\)", value)
