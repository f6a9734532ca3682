"""The schemes a user can name, and how options change them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe, Order
from vllm_quantkit.spec import ALL_ROWS, PER_CHANNEL, ActivationSpec, Frozen, WeightSpec

GROUP = 128
"""Input channels per scale of 4-bit schemes, and the side of an FP8 block."""

KEEP = "none"
"""The scheme of layers that stay in 16 bits."""


def _integers(bits: int, group_size: int, *, symmetric: bool = True) -> WeightSpec:
    return WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric)


def _floats(group_size: int, scale_rows: int) -> WeightSpec:
    return WeightSpec(
        bits=8, group_size=group_size, symmetric=True, code_type="e4m3", scale_rows=scale_rows
    )


TOKEN_INT8 = ActivationSpec(code="int8")
TOKEN_FP8 = ActivationSpec(code="e4m3")
BLOCK_FP8 = ActivationSpec(code="e4m3", group_size=GROUP)

PRESETS: dict[str, LayerRecipe] = {
    "rtn": LayerRecipe(weight=_integers(4, GROUP)),
    "mse": LayerRecipe(weight=_integers(4, GROUP), rounding="mse"),
    "gptq": LayerRecipe(weight=_integers(4, GROUP), rounding="gptq", order="static"),
    "awq": LayerRecipe(
        weight=_integers(4, GROUP, symmetric=False), transform="awq", rounding="mse"
    ),
    "awq+gptq": LayerRecipe(
        weight=_integers(4, GROUP, symmetric=False),
        transform="awq",
        rounding="gptq",
        order="static",
    ),
    "smoothquant": LayerRecipe(
        weight=_integers(8, PER_CHANNEL), activation=TOKEN_INT8, transform="smoothquant"
    ),
    "smoothquant+gptq": LayerRecipe(
        weight=_integers(8, PER_CHANNEL),
        activation=TOKEN_INT8,
        transform="smoothquant",
        rounding="gptq",
        order="static",
    ),
    "int8": LayerRecipe(weight=_integers(8, PER_CHANNEL)),
    "fp8": LayerRecipe(weight=_floats(PER_CHANNEL, 1), activation=TOKEN_FP8),
    "fp8-block": LayerRecipe(weight=_floats(GROUP, GROUP), activation=BLOCK_FP8),
}
"""Scheme name to its defaults."""


class LayerOptions(Frozen):
    """What a user may say of the layers of a model, or of a rule; None leaves the default.

    Attributes:
        scheme: one of `PRESETS`, or `none` for 16 bits.
        bits: of integer weights, 2 to 8.
        group_size: input channels per scale of integer weights; -1 for one scale per channel.
        symmetric: integer weights without zero-points.
        act_order: of GPTQ.
        damping: of GPTQ, a share of the Hessian's mean diagonal.
        alpha: SmoothQuant's migration strength, or `search`.
        scales: output channels and blocks that share an FP8 weight's scale.
        activations: 8-bit inputs with a scale per batch, with a fixed one, or none at all.
    """

    scheme: str | None = None
    bits: int | None = Field(default=None, ge=2, le=8)
    group_size: int | None = Field(default=None, ge=-1)
    symmetric: bool | None = None
    act_order: Order | None = None
    damping: float | None = Field(default=None, gt=0, lt=1)
    alpha: float | Literal["search"] | None = None
    scales: Literal["tensor", "channel", "block"] | None = None
    activations: Literal["none", "dynamic", "static"] | None = None

    def over(self, base: LayerOptions) -> LayerOptions:
        """These options where they are given, else those of `base`; all anew for a new scheme."""
        given = {
            name: getattr(self, name)
            for name in LayerOptions.model_fields
            if getattr(self, name) is not None
        }
        if self.scheme is not None and self.scheme != base.scheme:
            return LayerOptions(**given)
        return LayerOptions(
            **{name: given.get(name, getattr(base, name)) for name in LayerOptions.model_fields}
        )

    def recipe(self) -> LayerRecipe | None:
        """The recipe that these options describe; None for 16 bits.

        Raises:
            ConfigError: no such scheme, or one that an option does not fit.
        """
        if self.scheme == KEEP:
            return None
        if self.scheme not in PRESETS:
            raise ConfigError(
                f"scheme {self.scheme!r} is unknown; choose {', '.join(PRESETS)} or {KEEP}."
            )
        preset = PRESETS[self.scheme]
        try:
            return LayerRecipe(
                weight=self._weight(preset),
                activation=self._activation(preset),
                transform=preset.transform,
                rounding=preset.rounding,
                order=self._order(preset),
                damping=self._only_for(preset.rounding == "gptq", "damping", preset.damping),
                alpha=self._alpha(preset),
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"scheme {self.scheme!r}: {reason}.") from error

    def _weight(self, preset: LayerRecipe) -> WeightSpec:
        weight = preset.weight
        integers = weight.code_type == "int"
        fields = weight.model_dump()
        fields["bits"] = self._only_for(integers, "bits", weight.bits)
        fields["symmetric"] = self._only_for(integers, "symmetric", weight.symmetric)
        fields["group_size"] = self._only_for(integers, "group_size", weight.group_size)
        fields["act_order"] = self._order(preset) == "group"
        if fields["group_size"] == 0:
            raise ConfigError("group_size 0 has no meaning: give a positive number, or -1.")
        if self.scales is not None:
            self._only_for(not integers, "scales", None)
            fields |= SCALES[self.scales]
        return WeightSpec(**fields)

    def _activation(self, preset: LayerRecipe) -> ActivationSpec | None:
        if self.activations is None:
            if self.scales == "block" and preset.activation is not None:
                return BLOCK_FP8
            return preset.activation
        if self.activations == "none":
            return None
        self._only_for(preset.weight.bits == 8, "activations", None)
        code: Literal["int8", "e4m3"] = "int8" if preset.weight.code_type == "int" else "e4m3"
        if self.activations == "static":
            return ActivationSpec(code=code, dynamic=False, group_size=0)
        return preset.activation or ActivationSpec(code=code)

    def _order(self, preset: LayerRecipe) -> Order:
        order: Order = self._only_for(preset.rounding == "gptq", "act_order", preset.order)
        return order

    def _alpha(self, preset: LayerRecipe) -> float | None:
        alpha = self._only_for(preset.transform == "smoothquant", "alpha", preset.alpha)
        return None if alpha == "search" else alpha

    def _only_for(self, fits: bool, name: str, default: Any) -> Any:
        """The option where it was given and fits, else the default.

        Raises:
            ConfigError: it was given and does not fit.
        """
        value = getattr(self, name)
        if value is None:
            return default
        if not fits:
            raise ConfigError(
                f"{name} {value!r} does not apply to scheme {self.scheme!r}: drop it."
            )
        return value


SCALES: dict[str, dict[str, int]] = {
    "tensor": {"group_size": PER_CHANNEL, "scale_rows": ALL_ROWS},
    "channel": {"group_size": PER_CHANNEL, "scale_rows": 1},
    "block": {"group_size": GROUP, "scale_rows": GROUP},
}
"""How FP8 weights share scales."""
