"""What a bitsandbytes config says: LLM.int8() or 4 bits, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import AliasChoices, Field

from vllm_quantkit.formats._fields import Fields
from vllm_quantkit.formats._fp8_config import skip
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, LayerRules, SchemeSpec, WeightSpec

BLOCK_SIZE = 64
"""Weights that share a scale in 4 bits; no config can say another."""

FLAG = "true or false, and true for one of load_in_8bit and load_in_4bit"


class BitsandbytesFields(Fields):
    """The keys of a bitsandbytes config that decide how it is stored."""

    dialect: ClassVar[str] = "bitsandbytes"
    allowed: ClassVar[Mapping[str, str]] = {
        "load_in_8bit": FLAG,
        "_load_in_8bit": FLAG,
        "load_in_4bit": FLAG,
        "_load_in_4bit": FLAG,
        "llm_int8_threshold": "a number that is not negative",
        "llm_int8_skip_modules": "a list of module names, or null",
        "llm_int8_has_fp16_weight": "true or false",
        "bnb_4bit_quant_type": "'nf4' or 'fp4'",
        "bnb_4bit_quant_storage": "'uint8'",
    }

    load_in_8bit: bool = Field(
        default=False, validation_alias=AliasChoices("load_in_8bit", "_load_in_8bit")
    )
    load_in_4bit: bool = Field(
        default=False, validation_alias=AliasChoices("load_in_4bit", "_load_in_4bit")
    )
    llm_int8_threshold: float = Field(6.0, ge=0)
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"
    bnb_4bit_quant_storage: str | None = "uint8"

    def rules(self) -> LayerRules:
        """One scheme for all layers but those of the skip list, or without one, the head.

        Raises:
            ConfigError: not exactly one of 8 and 4 bits, or a bad regular expression.
            UnsupportedScheme: 16-bit main weights, or 4 bits stored in other elements than bytes.
        """
        if self.load_in_8bit == self.load_in_4bit:
            raise self.malformed("load_in_8bit", self.load_in_8bit, FLAG)
        scheme = self._eight_bits() if self.load_in_8bit else self._four_bits()
        skipped = self.llm_int8_skip_modules
        return LayerRules(
            rules=(*skip(self, "llm_int8_skip_modules", skipped),),
            default=scheme,
            lm_head=None if skipped is None else scheme,
        )

    def _eight_bits(self) -> SchemeSpec:
        if self.llm_int8_has_fp16_weight:
            raise self.unserved(
                "llm_int8_has_fp16_weight",
                True,
                "weights stored in int8",
                "Save the model again without it.",
            )
        return SchemeSpec(
            dialect="bitsandbytes",
            weight=WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True),
            activation=ActivationSpec(
                code="int8", outlier_threshold=self.llm_int8_threshold or None
            ),
        )

    def _four_bits(self) -> SchemeSpec:
        if self.bnb_4bit_quant_storage not in (None, "uint8"):
            raise self.unserved(
                "bnb_4bit_quant_storage",
                self.bnb_4bit_quant_storage,
                "'uint8'",
                "Save the model again with bnb_4bit_quant_storage 'uint8'.",
            )
        weight = WeightSpec(
            bits=4,
            group_size=BLOCK_SIZE,
            symmetric=True,
            code_type=self.bnb_4bit_quant_type,
        )
        return SchemeSpec(dialect="bitsandbytes", weight=weight)
