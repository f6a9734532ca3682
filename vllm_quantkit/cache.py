"""Where commands keep what they may need again: checkpoints, scores, logs of engines."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`QUANTKIT_CACHE`, else `vllm-quantkit` in the user's cache folder; made if need be."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("QUANTKIT_CACHE") or os.path.join(home, "vllm-quantkit")
    folder = Path(root).expanduser().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
