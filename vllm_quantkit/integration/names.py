"""Which checkpoint layer a model's layer is, and what its headers say about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_quantkit.spec import LayerRules, SchemeSpec


class LayerNames:
    """Checkpoint names and headers, seen from the model's names.

    Rules speak of checkpoint layers. Models may rename them (`hf_to_vllm_mapper`), so names found
    in the headers are mapped forward and looked up backward.
    """

    def __init__(self) -> None:
        self._schemes: dict[str, SchemeSpec | None] = {}

    def audit(self, model: str, revision: str | None, rules: LayerRules) -> None:
        pass

    def rename(self, mapper: Any) -> None:
        pass

    def scheme_for(self, name: str, rules: LayerRules) -> SchemeSpec | None:
        return rules.scheme_for(name)
