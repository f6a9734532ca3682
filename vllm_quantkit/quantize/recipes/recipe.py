"""What to do with each layer: numerics, transform and rounding, by name pattern."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vllm_quantkit.spec import ActivationSpec, Frozen, WeightSpec

Transform = Literal["none", "awq", "smoothquant"]
"""What is folded into the op before a layer, before it is rounded."""

Rounding = Literal["nearest", "mse", "gptq"]
"""How weights become codes: full range; range of least output error; with error feedback."""

Order = Literal["none", "static", "group"]
"""In which order GPTQ rounds input channels, the most active first unless `none`. `static` keeps
the groups of the natural order, `group` makes groups of that order and stores the map."""


class LayerRecipe(Frozen):
    """How one layer is quantised.

    Attributes:
        weight: the numerics of the stored weight; `act_order` is True where `order` is `group`.
        activation: the numerics of the inputs; None leaves them in 16 bits.
        transform: folded into the previous op, where the model has one.
        rounding: how codes are chosen.
        order: of GPTQ's channels.
        damping: share of the Hessian's mean diagonal that GPTQ adds to its diagonal.
        alpha: SmoothQuant's migration strength; None searches it layer by layer.
    """

    weight: WeightSpec
    activation: ActivationSpec | None = None
    transform: Transform = "none"
    rounding: Rounding = "nearest"
    order: Order = "none"
    damping: float = Field(default=0.01, gt=0, lt=1)
    alpha: float | None = Field(default=None, ge=0, le=1)

    @property
    def uses_data(self) -> bool:
        """True where the result is made from activations."""
        static = self.activation is not None and not self.activation.dynamic
        return self.rounding == "gptq" or self.transform != "none" or static

    @model_validator(mode="after")
    def _is_possible(self) -> LayerRecipe:
        if self.weight.act_order != (self.order == "group"):
            raise ValueError("act_order is stored exactly where order is 'group'")
        if self.order != "none" and self.rounding != "gptq":
            raise ValueError(f"order {self.order!r} is GPTQ's; rounding is {self.rounding!r}")
        if self.weight.code_type != "int" and self.rounding != "nearest":
            raise ValueError(f"{self.rounding!r} rounds to integers, not {self.weight.code_type!r}")
        return self
