"""The text that rows are judged on: it calibrated none of them."""

from __future__ import annotations

from transformers import AutoTokenizer

from vllm_quantkit.compare.checkpoints import Maker
from vllm_quantkit.evaluate.origin import read_origin
from vllm_quantkit.evaluate.text import TextOptions, fresh_windows
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.quantize.calibration import TokenSet


def held_out_windows(maker: Maker, text: TextOptions) -> Windows:
    """Windows of the text that was given, or of documents that calibration leaves alone.

    Args:
        maker: knows the model and its calibration.
        text: what the user wants.

    Raises:
        QuantkitError: the text cannot be read, or is too little.
    """
    limit = read_origin(maker.source).max_length
    if text.source is not None:
        return fresh_windows(AutoTokenizer.from_pretrained(maker.source), limit, text)
    # Another number of held-out samples would hold out documents that calibrated a row.
    found = maker.token_sets(maker.calibration).held_out
    length = min(text.length or limit, limit - 1)
    rows = tuple(row[:length] for row in _rows(found))[: text.windows]
    return Windows(rows, f"{found.source}, held out from calibration")


def _rows(found: TokenSet) -> list[tuple[int, ...]]:
    """Samples without their padding."""
    mask = found.attention_mask
    sizes = [found.input_ids.shape[1]] * found.samples if mask is None else mask.sum(1).tolist()
    rows = zip(found.input_ids.tolist(), sizes, strict=True)
    return [tuple(row[:size]) for row, size in rows if size > 1]
