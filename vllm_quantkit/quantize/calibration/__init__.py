"""Calibration data: from a file or data set to samples of tokens."""

from vllm_quantkit.quantize.calibration.options import (
    CalibrationOptions,
    read_calibration_options,
)
from vllm_quantkit.quantize.calibration.token_sets import TokenSet, TokenSets, load_token_sets

__all__ = [
    "CalibrationOptions",
    "TokenSet",
    "TokenSets",
    "load_token_sets",
    "read_calibration_options",
]
