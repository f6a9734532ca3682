"""Documentation packages -> tokenizer, token streams and the two texts shipped with the model.

Get the packages named in `sources.py` with `apt-get download NAME` and unpack each with
`dpkg -x FILE.deb PACKAGES/NAME`; nothing has to be installed. Then run
`python prepare_data.py --packages PACKAGES --out DIR`.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from chat_data import CHAT_TEMPLATE, conversations
from html_prose import Page, Section, parse_page
from safetensors.torch import save_file
from sources import SOURCES, Source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
HELD_OUT_BYTES = 150_000
CALIBRATION_BYTES = 250_000
SHORTEST_PAGE, LONGEST_EXCERPT = 600, 12_000


@dataclass(frozen=True)
class Split:
    """Pages by use; `calibration` is a part of `train`, and `held_out` shares no page with it."""

    train: tuple[Page, ...]
    calibration: tuple[Page, ...]
    held_out: tuple[Page, ...]


def source_root(packages: Path, source: Source) -> Path:
    """The folder of the source's pages; raises FileNotFoundError that says how to get them."""
    root = packages / source.package / source.folder
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is no folder. Run `apt-get download {source.package}`, then "
            f"`dpkg -x {source.package}_*.deb {packages / source.package}`, and start again."
        )
    return root


def unseen(sections: Iterable[Section], seen: set[str]) -> tuple[Section, ...]:
    """The sections without paragraphs that `seen` already holds; adds the others to `seen`."""
    kept: list[Section] = []
    for section in sections:
        paragraphs = [text for text in section.paragraphs if text not in seen]
        seen.update(paragraphs)
        kept.append(Section(section.heading, paragraphs))
    return tuple(kept)


def read_pages(packages: Path, source: Source) -> list[Page]:
    """The pages of one source that hold enough prose, by path, without repeated paragraphs."""
    root, seen, pages = source_root(packages, source), set[str](), list[Page]()
    for file in sorted(root.rglob("*.html")):
        path = file.relative_to(root).as_posix()
        if path.startswith(source.left_out) or not file.is_file():
            continue
        page = parse_page(file.read_text(encoding="utf-8", errors="replace"), source.name, path)
        named = (
            page.sections[1:]
            if page.sections and page.sections[0].heading.startswith(source.site_title)
            else page.sections
        )
        page = Page(source.name, path, unseen(named, seen))
        if (
            sum(len(text) for section in page.sections for text in section.paragraphs)
            >= SHORTEST_PAGE
        ):
            pages.append(page)
    return pages


def order_of(page: Page) -> str:
    """A fixed pseudo-random sorting key."""
    return hashlib.sha256(f"{page.source}/{page.path}".encode()).hexdigest()


def take(pages: list[Page], size: int) -> tuple[Page, ...]:
    """Pages of moderate length from the front of `pages` that fit into `size` bytes together."""
    taken: list[Page] = []
    for page in pages:
        length = len(page.text())
        if length <= min(LONGEST_EXCERPT, size):
            taken.append(page)
            size -= length
    return tuple(taken)


def split_pages(pages_by_source: list[list[Page]]) -> Split:
    """Every source gives to the held-out and the calibration text in proportion to its size."""
    train, calibration, held_out = list[Page](), list[Page](), list[Page]()
    total = sum(len(page.text()) for pages in pages_by_source for page in pages)
    for pages in pages_by_source:
        share = sum(len(page.text()) for page in pages) / total
        ordered = sorted(pages, key=order_of)
        kept_out = take(ordered, round(HELD_OUT_BYTES * share))
        rest = [page for page in ordered if page not in kept_out]
        held_out += kept_out
        train += rest
        calibration += take(rest, round(CALIBRATION_BYTES * share))
    return Split(*(tuple(sorted(part, key=order_of)) for part in (train, calibration, held_out)))


def joined(pages: Iterable[Page]) -> str:
    """The pages' texts, a blank line between them."""
    return "\n".join(page.text() for page in pages)


def page_list(split: Split) -> str:
    """Which page each text comes from, a line a page: text, source, path."""
    parts = {"held_out.txt": split.held_out, "calibration.txt": split.calibration}
    lines = [f"{name}\t{page.source}\t{page.path}" for name, part in parts.items() for page in part]
    return "\n".join(["text\tsource\tpage", *lines]) + "\n"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY entries that puts `<|endoftext|>` first in every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bos = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        pad_token=bos,
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves under the class name that every transformers release with fast tokenizers can load."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], bos: bool = True) -> torch.Tensor:
    """[tokens] int16, all texts in one stream; `bos` is False where texts begin with it."""
    rows = tokenizer(texts, add_special_tokens=bos)["input_ids"]
    return torch.tensor([token for row in rows for token in row], dtype=torch.int16)


def chat_texts(tokenizer: PreTrainedTokenizerFast, pages: Iterable[Page]) -> list[str]:
    """Conversations about the pages, through the chat template, shuffled with a fixed seed."""
    rng = random.Random(0)
    talks = [talk for page in pages for talk in conversations(page, rng)]
    rng.shuffle(talks)
    return [str(tokenizer.apply_chat_template(talk, tokenize=False)) for talk in talks]


def write_all(split: Split, out: Path) -> dict[str, int]:
    """Writes tokenizer, token streams, texts and the list of their pages; returns counts."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "held_out.txt").write_text(joined(split.held_out))
    (out / "calibration.txt").write_text(joined(split.calibration))
    (out / "pages.tsv").write_text(page_list(split))
    texts = [page.text() for page in split.train]
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, out / "tokenizer")
    streams = {
        "prose": encode(tokenizer, texts),
        "chat": encode(tokenizer, chat_texts(tokenizer, split.train), bos=False),
        "held_out": encode(tokenizer, [joined(split.held_out)], bos=True)[1:].clone(),
    }
    save_file(streams, out / "tokens.safetensors")
    pages = {
        "train_pages": len(split.train),
        "held_out_pages": len(split.held_out),
        "train_bytes": sum(map(len, texts)),
    }
    return pages | {f"{name}_tokens": stream.numel() for name, stream in streams.items()}


def main() -> None:
    """Reads the packages and writes everything to one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path("packages"),
        help="folder that holds one unpacked package per name",
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pages_by_source = [read_pages(args.packages, source) for source in SOURCES]
    for source, pages in zip(SOURCES, pages_by_source, strict=True):
        print(f"{source.name}: {len(pages)} pages, {sum(len(page.text()) for page in pages)} bytes")
    print(json.dumps(write_all(split_pages(pages_by_source), args.out), indent=2))


if __name__ == "__main__":
    main()
