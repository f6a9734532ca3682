"""The report that people read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from tests.reporting.evaluations import EVALUATION
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.reporting import document as document_module
from vllm_quantkit.reporting import drawing, files, sections
from vllm_quantkit.reporting.document import document
from vllm_quantkit.reporting.evaluation import Evaluation, Served
from vllm_quantkit.reporting.files import write_report_files
from vllm_quantkit.reporting.html import render_html
from vllm_quantkit.reporting.markdown import render_markdown

VOID = {"meta", "br", "hr", "img", "link", "input"}
LOADING = {"src", "srcset", "data", "poster", "action", "background"}
"""Attributes by which a page loads something."""


class Page(HTMLParser):
    """A page's elements, its ids and what it refers to; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def note(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.references += [str(v) for name, v in attrs if name.endswith("href") or name in LOADING]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def found():
    return document(EVALUATION)


@pytest.fixture(scope="module")
def html(found) -> str:
    return render_html(found)


def without_pictures(monkeypatch) -> None:
    for module in (document_module, sections, files, drawing):
        monkeypatch.setattr(module, "can_draw", lambda: False)


def test_the_page_is_well_formed_and_alone(html):
    page = Page(html)

    assert page.tags[:2] == ["html", "head"]
    assert "script" not in page.tags
    assert "link" not in page.tags
    # Everything referred to is in the page.
    assert page.references
    assert all(each.removeprefix("#") in page.ids for each in page.references)
    assert all(each.startswith("#") for each in page.references)
    assert not re.search(r"https?:|@import|url\((?!#)", html)


def test_ids_are_there_once(html):
    page = Page(html)

    assert len(page.ids) == len(set(page.ids))
    for name, value in page.attributes:
        if name in ("aria-labelledby", "aria-describedby"):
            assert value in page.ids


def test_pictures_have_names_and_descriptions(html, found):
    assert [picture.name for picture in found.pictures] == ["tokens", "layers", "survival", "along"]
    assert html.count('<svg role="img" aria-labelledby') == 4
    assert "costs most: 0.004 nats" in html


def test_the_ink_is_the_pages(html):
    assert drawing.INK not in html.replace(f"--ink: {drawing.INK}", "")
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html


def test_every_part_is_reported(found):
    text = render_markdown(found)

    for part in (
        "# What models/tiny-awq costs",
        "The machine was busy.",
        "from 17.200 to 17.500 (+1.50%)",
        "| KL divergence, nats per token | 0.013 | 0.012 | 0.014 |",
        "![Of 2 groups of layers, model.layers.0.self_attn.qkv_proj costs most",
        "| model.layers.0.mlp.down_proj | 8 | -0.001 |",
        "### All blocks",
        "gsm8k, exact_match,strict-match | 0.5 (0.48 to 0.52)",
        "results/model.json, results/base.json",
        "parts from the base in 2 of 3 texts of up to 60 tokens",
        "errors compound",
        "| share that never parts | 33% (6% to 79%) | 33% (6% to 79%) |",
        "| greedy | model | 3 | 5 | 1 |",
        "Continuations are short.",
        "| model | models/tiny-awq --quantization quantkit-awq --max-model-len 512",
        "| machine | a CPU of 2 cores |",
        "ab" * 32,
    ):
        assert part in text, part


def test_tables_have_as_many_cells_in_each_row(found):
    for line, following in pairwise(render_markdown(found).splitlines()):
        if line.startswith("|") and following.startswith("|"):
            cells = [len(re.findall(r"(?<!\\)\|", each)) for each in (line, following)]
            assert cells[0] == cells[1], following


def test_names_cannot_become_marks():
    served = Served(model="<b>*me*</b>|`x`_y_", max_model_len=8)
    evaluation = EVALUATION.model_copy(update={"model": served, "machine": "<script>alert(1)"})
    found = document(evaluation)

    html, markdown = render_html(found), render_markdown(found)

    Page(html)
    assert "&lt;b&gt;*me*&lt;/b&gt;" in html
    for text in (html, markdown):
        assert "<b>" not in text
        assert "<script" not in text
    assert r"&lt;b&gt;\*me\*&lt;/b&gt;\|\`x\`\_y\_" in markdown


def test_names_with_dollars_are_drawn_as_they_are():
    layer = EVALUATION.by_layer[0].model_copy(update={"group": "a$b$ <i>&"})
    found = document(EVALUATION.model_copy(update={"by_layer": (layer,)}))

    (picture,) = [each for each in found.pictures if each.name == "layers"]

    texts = "".join(ET.fromstring(picture.file).itertext())
    assert "a$b$ <i>&" in texts


def test_files_lie_beside_the_checkpoint(tmp_path):
    written = write_report_files(tmp_path, EVALUATION)

    folder = tmp_path / "quantkit_report"
    names = {"report.md", "report.html", "tokens.svg", "layers.svg", "survival.svg", "along.svg"}
    assert {each.name for each in folder.iterdir()} == names
    assert written.note == ""
    shown = re.findall(r"\]\((.*?)\)", written.markdown.read_text())
    assert {folder / name for name in shown} == set(written.pictures)


def test_the_same_evaluation_gives_the_same_bytes(tmp_path):
    first = write_report_files(tmp_path / "a", EVALUATION).markdown.parent
    second = write_report_files(tmp_path / "b", EVALUATION).markdown.parent

    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_a_picture_that_no_longer_holds_goes(tmp_path):
    write_report_files(tmp_path, EVALUATION)
    other = tmp_path / "quantkit_report" / "mine.svg"
    other.write_text("mine")

    write_report_files(tmp_path, EVALUATION.model_copy(update={"by_layer": ()}))

    assert not (tmp_path / "quantkit_report" / "layers.svg").exists()
    assert other.read_text() == "mine"


def test_without_matplotlib_there_is_a_report_and_a_sentence(tmp_path, monkeypatch):
    without_pictures(monkeypatch)

    written = write_report_files(tmp_path, EVALUATION)

    assert written.pictures == ()
    assert 'pip install "vllm-quantkit[bench]"' in written.note
    assert "![" not in written.markdown.read_text()
    assert "<svg" not in written.html.read_text()
    assert "matplotlib is not installed" in written.html.read_text()
    Page(written.html.read_text())


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "quantkit_report").write_text("a file")

    with pytest.raises(CheckpointError, match="cannot be written"):
        write_report_files(tmp_path, EVALUATION)


def test_an_evaluation_of_little_is_a_short_report():
    little = Evaluation(
        model=Served(model="m", max_model_len=8), backend="transformers 5", machine="this"
    )
    found = document(little)

    assert [section.title for section in found.sections] == ["What was measured, and with what"]
    assert found.pictures == ()
    Page(render_html(found))
