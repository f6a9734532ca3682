"""A run as a user asks for it: names and options become a model folder, a recipe and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.quantize.calibration import (
    CalibrationOptions,
    TokenSets,
    load_token_sets,
    read_calibration_options,
)
from vllm_quantkit.quantize.hub import hub_name, model_folder
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.output.report import CalibrationSummary, Report
from vllm_quantkit.quantize.pipeline import quantize
from vllm_quantkit.quantize.progress import Watcher
from vllm_quantkit.quantize.recipes.recipe_file import Recipe, make_recipe
from vllm_quantkit.quantize.run_options import RunOptions, parse_blocks

UNLIMITED = 1 << 30
"""Tokens that a model takes whose config names no maximum."""


@dataclass(frozen=True)
class Job:
    """What is quantised, and how.

    Attributes:
        model: folder or hub name, as the user gave it.
        source: the folder.
        recipe: what is done with which layer.
        calibration: what it is calibrated on; None where no text is wanted.
        run: how it is gone about.
    """

    model: str
    source: Path
    recipe: Recipe
    calibration: CalibrationOptions | None
    run: RunOptions

    @classmethod
    def prepare(
        cls,
        model: str,
        recipe: Mapping[str, Any],
        calibration: Mapping[str, Any],
        run: Mapping[str, Any],
    ) -> Job:
        """Checks what a user gave; text is read where it is named or the recipe needs it.

        Args:
            model: folder or hub name.
            recipe: keys of `Recipe`.
            calibration: keys of `CalibrationOptions`.
            run: keys of `RunOptions`.

        Raises:
            ConfigError: names the key, its value and what is allowed.
            CheckpointError: there is no such model.
        """
        chosen = make_recipe(dict(recipe))
        options = None
        if chosen.needs_data or calibration:
            options = read_calibration_options(calibration)
        return cls(model, model_folder(model), chosen, options, run_options(run))

    def token_sets(self) -> TokenSets | None:
        """Token ids to calibrate on and to measure quality on.

        Raises:
            QuantkitError: the source cannot be read or has too little text.
        """
        if self.calibration is None:
            return None
        trust = self.run.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=trust)
        return load_token_sets(self.calibration, tokenizer, self.max_length())

    def max_length(self) -> int:
        """The most tokens that the model takes."""
        trust = self.run.trust_remote_code
        config = AutoConfig.from_pretrained(self.source, trust_remote_code=trust)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(limit or UNLIMITED)

    def rehearsing(self, blocks: str | None) -> Job:
        """The job with these blocks, such as `0,last`, tried out first.

        Raises:
            ConfigError: there is no such block.
        """
        if blocks is None:
            return self
        trust = self.run.trust_remote_code
        count = ModelShell.open(self.source, trust_remote_code=trust).block_count
        rehearse = parse_blocks(blocks, count)
        return replace(self, run=self.run.model_copy(update={"rehearse": rehearse}))

    def quantize(self, out: Path, sets: TokenSets | None, watcher: Watcher) -> Report:
        """See `pipeline.quantize`."""
        summary = None
        if self.calibration is not None and sets is not None:
            summary = CalibrationSummary.of(self.calibration, sets)
        return quantize(
            self.source,
            out,
            self.recipe,
            sets,
            run=self.run,
            summary=summary,
            model_name=hub_name(self.model),
            watcher=watcher,
        )


def run_options(given: Mapping[str, Any]) -> RunOptions:
    """The options, checked.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    try:
        return RunOptions(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where} = {first['input']!r}: {first['msg']}.") from error
