"""Integer weights made at load: what INT4 and INT8 weight-only share."""

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.spec import SchemeSpec, WeightSpec

OPTIONS = ("group_size", "symmetric", "refine")
"""The `LayerOptions` that mean something."""


def weight_only(options: LayerOptions, default: WeightSpec, refine: str) -> SchemeSpec:
    """`default`, its grids found by `refine`, where the options say nothing else.

    Raises:
        ConfigError: HQQ is asked for without zero-points, which it moves.
    """
    symmetric = default.symmetric if options.symmetric is None else options.symmetric
    refine = options.refine or refine
    if refine == "hqq" and symmetric:
        raise ConfigError(
            "--additional-config quantkit: refine = 'hqq' moves zero-points, but symmetric weights "
            "have none; set symmetric to false, or refine to 'clip'."
        )
    weight = WeightSpec(
        bits=default.bits,
        group_size=options.group_size or default.group_size,
        symmetric=symmetric,
    )
    return SchemeSpec(dialect="16-bit", variant=refine, weight=weight)
