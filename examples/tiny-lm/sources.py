"""The texts the model learns from: their Debian packages, and which pages are left out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One project's documentation as Debian packages it.

    `folder` lies inside the unpacked package; `left_out` are starts of page paths (relative to it)
    that are change logs, indexes or diagrams rather than prose; `site_title` opens the first
    heading of pages that carry the site's name.
    """

    name: str
    package: str
    folder: str
    licence: str
    left_out: tuple[str, ...]
    site_title: str = "\0"


SOURCES = (
    Source(
        name="PostgreSQL",
        package="postgresql-doc-15",
        folder="usr/share/doc/postgresql-doc-15/html",
        licence="PostgreSQL",
        left_out=(
            "release",
            "bookindex",
            "biblio",
            "features",
            "index",
            "appendix-obsolete",
            "contributors",
            "legalnotice",
        ),
        site_title="PostgreSQL 15",
    ),
    Source(
        name="SQLite",
        package="sqlite3-doc",
        folder="usr/share/doc/sqlite3",
        licence="public domain",
        left_out=(
            "releaselog",
            "changes",
            "syntax",
            "chronology",
            "toc",
            "keyword_index",
            "doclist",
            "sitemap",
            "matrix",
            "c3ref",
        ),
    ),
    Source(
        name="Django",
        package="python-django-doc",
        folder="usr/share/doc/python-django-doc/html",
        licence="BSD-3-Clause",
        left_out=(
            "releases",
            "_modules",
            "genindex",
            "py-modindex",
            "search",
            "contents",
            "glossary",
        ),
        site_title="Django 3",
    ),
    Source(
        name="Python",
        package="python3.11-doc",
        folder="usr/share/doc/python3.11/html",
        licence="PSF-2.0",
        left_out=(
            "whatsnew",
            "genindex",
            "py-modindex",
            "search",
            "contents",
            "license",
            "copyright",
            "bugs",
            "about",
            "download",
        ),
    ),
)
