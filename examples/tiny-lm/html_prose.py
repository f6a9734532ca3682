"""Page of HTML -> sections of plain English paragraphs, with the standard library only."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5"})
BLOCKS = HEADINGS | frozenset(
    {"p", "div", "section", "li", "ul", "ol", "dl", "dt", "dd", "blockquote", "article", "main"}
)
SKIPPED_TAGS = frozenset(
    {"pre", "table", "script", "style", "nav", "header", "footer", "title", "dt", "form", "svg"}
)
SKIPPED_NAMES = frozenset(
    {
        *(
            "navheader",
            "navfooter",
            "toc",
            "sphinxsidebar",
            "related",
            "footer",
            "menu",
            "nosearch",
            "tagline",
        ),
        *(
            "versionchanged",
            "versionadded",
            "deprecated",
            "contents",
            "topic",
            "hd",
            "ft",
            "list-of-figures",
        ),
        *(
            "viewcode-link",
            "headerlink",
            "quickview",
            "toplang",
            "bottomlang",
            "comments_thread",
            "indexterm",
            "search-wrapper",
        ),
    }
)
ASCII_FORMS = {
    **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f", " "),
    **dict.fromkeys("\u00ad\u200b\u00b6\u21b5\uf0c1", ""),
    "\u2014": " - ",
    "\u2026": "...",
    "\u00d7": "x",
    "\u2192": "->",
    "\u2264": "<=",
    "\u2265": ">=",
}
ASCII_TABLE = str.maketrans(ASCII_FORMS)
CROSS_REFERENCE = re.compile(r"\s*\((?:see )?(?:Section|Chapter|Table|Figure|Appendix) [\w.]+\)")
NUMBERING = re.compile(
    r"^(?:(?:Chapter|Appendix|Part)?\s*(?:\d+(?:\.\d+)*|[A-Z](?:\.\d+)+|[IVX]+)\.|\d+(?:\.\d+)+)\s+"
)


@dataclass
class Section:
    """A heading and the paragraphs below it."""

    heading: str
    paragraphs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """One page of documentation; `source` names the project it documents."""

    source: str
    path: str
    sections: tuple[Section, ...]

    def text(self) -> str:
        """The page as text: `# title`, `## section`, and paragraphs parted by blank lines."""
        parts: list[str] = []
        for index, section in enumerate(self.sections):
            if section.paragraphs or index == 0:
                parts += [f"{'#' if index == 0 else '##'} {section.heading}", *section.paragraphs]
        return "\n\n".join(parts) + "\n"


def normalise(text: str) -> str:
    """ASCII for typographic signs, single spaces, no `(see Section 4.2)` and the like."""
    return CROSS_REFERENCE.sub("", re.sub(r"\s+", " ", text.translate(ASCII_TABLE))).strip()


def is_prose(text: str) -> bool:
    """True for eight or more words of ASCII, mostly letters, ended by a full stop or the like."""
    letters = sum(char.isalpha() or char == " " for char in text)
    shaped = text[:1].isalpha() and text[-1:] in ".!?:)"
    return text.isascii() and shaped and len(text.split()) >= 8 and letters >= 0.87 * len(text)


class ProseParser(HTMLParser):
    """Collects headings and paragraphs.

    Inside a skipped element only tags of its own name count, so unclosed tags do no harm.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[Section] = []
        self._buffer: list[str] = []
        self._skip_tag = ""
        self._skip_depth = 0
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Starts a block or a skipped element."""
        if self._skip_depth:
            self._skip_depth += tag == self._skip_tag
            return
        names = {
            name
            for key, value in attrs
            if key in ("class", "id", "role")
            for name in (value or "").split()
        }
        if tag in BLOCKS or tag in SKIPPED_TAGS:
            self._flush()
        if tag in SKIPPED_TAGS or (names & SKIPPED_NAMES and tag not in ("body", "p", "h1", "h2")):
            self._skip_tag, self._skip_depth = tag, 1
        elif tag in HEADINGS:
            self._heading = True
        elif tag == "br":
            self._buffer.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """Ends a block or a skipped element."""
        if self._skip_depth:
            self._skip_depth -= tag == self._skip_tag
        elif tag in BLOCKS:
            self._flush()

    def handle_data(self, data: str) -> None:
        """Keeps text outside skipped elements."""
        if not self._skip_depth:
            self._buffer.append(data)

    def _flush(self) -> None:
        text, heading = normalise("".join(self._buffer)), self._heading
        self._buffer, self._heading = [], False
        if heading and text:
            self.sections.append(Section(NUMBERING.sub("", text)))
        elif is_prose(text) and self.sections:
            self.sections[-1].paragraphs.append(text)


def parse_page(html: str, source: str, path: str) -> Page:
    """The prose of one HTML page; a page without headings gives no sections.

    Pages whose first heading has no ASCII form (a translation, say) come back without sections too.
    """
    parser = ProseParser()
    title = re.search(r"<title>(.*?)</title>", html, re.S)
    body = html[max(html.find("<body"), 0) :]
    if title is not None and "<h1" not in body[:60000] and "<h2" not in body[:60000]:
        parser.sections.append(Section(normalise(re.sub(r"&\w+;|<.*?>", " ", title.group(1)))))
    parser.feed(body)
    parser.close()
    sections = parser.sections
    usable = bool(sections) and sections[0].heading.isascii()
    return Page(source, path, tuple(sections) if usable else ())
