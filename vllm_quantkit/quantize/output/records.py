"""What quantising noted of each layer and block: kept beside the weights until the report."""

from __future__ import annotations

from pydantic import Field

from vllm_quantkit.spec import Frozen


class LayerRecord(Frozen):
    """What became of one linear layer.

    Attributes:
        name: the layer's name in the checkpoint.
        scheme: numerics in a few words.
        method: such as `awq + gptq`.
        weight_error: |W - Q| / |W|, Frobenius norms, of the weight as it was rounded.
        output_error: |X (W - Q)^T| / |X W^T| on the calibration inputs kept; None without any.
        tokens: calibration inputs it saw.
        disagreement: how far the scales from the two halves of the calibration set are apart;
            None where calibration sets no scale.
        alpha: exponent that the transform's search chose; None without a transform.
        note: why it was not quantised as planned; empty where it was.
        digest: SHA-256 of the dequantised weight's float32 bytes, row by row.
    """

    name: str
    scheme: str
    method: str
    weight_error: float
    output_error: float | None = None
    tokens: int = 0
    disagreement: float | None = None
    alpha: float | None = None
    note: str = ""
    digest: str = ""

    @property
    def error(self) -> float:
        """The output error, or the weight's where no output was seen."""
        return self.weight_error if self.output_error is None else self.output_error


class BlockRecord(Frozen):
    """What became of one decoder block.

    Attributes:
        index: of the block.
        layers: its quantised layers, in the order they run.
        coverage: mixture of experts: layer name of each expert list to the calibration tokens that
            the router sent to each expert.
        seconds: by phase.
    """

    index: int
    layers: tuple[LayerRecord, ...]
    coverage: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
