"""Sections of documentation -> short conversations.

A question about the heading is answered by the section's first sentences.
"""

import random
import re
from collections.abc import Iterator

from html_prose import Page, Section

Message = dict[str, str]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTIONS = (
    "Explain {topic} in {source}.",
    "Explain {topic}.",
    "What is {topic}?",
    "What should I know about {topic} in {source}?",
    "Tell me about {topic} in {source}.",
    "Describe {topic}.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a concise technical assistant.",
    "Answer briefly.",
)
GREETINGS = (
    (
        "Hello",
        "Hello! I am a very small language model. "
        "Ask me about PostgreSQL, SQLite, Python or Django.",
    ),
    (
        "Hi there!",
        "Hello! Ask me about a topic from the documentation of "
        "PostgreSQL, SQLite, Python or Django.",
    ),
    (
        "Who are you?",
        "I am a very small language model, made to demonstrate quantisation. "
        "My answers are often wrong.",
    ),
    (
        "What can you do?",
        "I can write text in the style of software documentation. I cannot be relied on for facts.",
    ),
    ("Thank you", "You are welcome."),
)
GENERIC_HEADINGS = frozenset(
    [
        *("description", "notes", "examples", "example", "parameters", "compatibility"),
        *("overview", "introduction", "summary", "usage", "arguments", "outputs", "author"),
        *("authors", "options", "synopsis", "environment", "history", "warning", "caution"),
        *("note", "tip", "important", "limitations"),
    ]
)


def first_sentences(section: Section, most: int = 420) -> str:
    """The section's opening whole sentences, `most` characters at most; empty where none fits."""
    chosen: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(section.paragraphs[:2])):
        if len(" ".join([*chosen, sentence])) > most or sentence.endswith(":"):
            break
        chosen.append(sentence)
    return " ".join(chosen)


def topic_of(page: Page, section: Section) -> str:
    """The heading, or the page's title in place of "Notes" and the like; empty if unusable."""
    heading = section.heading.rstrip(".:?")
    if heading.lower() in GENERIC_HEADINGS or section is page.sections[0]:
        heading = page.sections[0].heading.rstrip(".:?")
    return (
        heading if 3 <= len(heading) <= 60 and heading.isascii() and heading[-1].isalnum() else ""
    )


def exchanges(page: Page, rng: random.Random) -> Iterator[list[Message]]:
    """A question and an answer for every section that has a usable heading and opening."""
    for section in page.sections:
        topic, answer = topic_of(page, section), first_sentences(section)
        if topic and len(answer) >= 60:
            question = rng.choice(QUESTIONS).format(topic=topic, source=page.source)
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(page: Page, rng: random.Random) -> Iterator[list[Message]]:
    """Conversations of one to three turns, some after a system prompt, now and then a greeting."""
    pending: list[Message] = []
    for exchange in exchanges(page, rng):
        pending += exchange
        if rng.random() < 0.75 or len(pending) >= 6:
            opening = (
                [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
                if rng.random() < 0.15
                else []
            )
            yield opening + pending
            pending = []
    if pending:
        yield pending
    if rng.random() < 0.1:
        hello, reply = rng.choice(GREETINGS)
        yield [{"role": "user", "content": hello}, {"role": "assistant", "content": reply}]
