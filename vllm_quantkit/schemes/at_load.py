"""Which layers of a 16-bit model are quantised at load, and how."""

from __future__ import annotations

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.options import LayerOptions, LayerOverride, Options
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.schemes.registry import SCHEMES, get_method
from vllm_quantkit.spec import LayerRule, LayerRules, SchemeSpec


def load_rules(method: type[Method], options: Options) -> LayerRules:
    """`ignore` first, then the patterns of `layers` in their order, then the method's scheme.

    The output head stays in 16 bits unless a pattern of `layers` names it.

    Raises:
        ConfigError: an option that the method does not look at, or no such method.
        UnsupportedScheme: the method does not quantise at load.
    """
    method.check_options(options)
    default = method.at_load(options)
    ignored = [LayerRule(pattern=pattern, scheme=None) for pattern in options.ignore]
    chosen = [
        LayerRule(pattern=pattern, scheme=_override(method, options, override))
        for pattern, override in options.layers.items()
    ]
    return LayerRules(rules=(*ignored, *chosen), default=default)


def refuse_load_options(method: type[Method], options: Options) -> None:
    """A checkpoint that is quantised already says itself how its layers are stored.

    Raises:
        ConfigError: an option is set that only means something at load.
    """
    given = {**options.given(), "ignore": options.ignore, "layers": options.layers}
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"--additional-config quantkit: {name} = {value!r} is for models that are "
                f"quantised at load, but this checkpoint is quantised already ({method.name}). "
                f"Remove the option, or serve the 16-bit model."
            )


def _override(
    method: type[Method], options: Options, override: LayerOverride | None
) -> SchemeSpec | None:
    if override is None:
        return None
    chosen = method if override.method is None else _method(override.method)
    chosen.check_options(override)
    general = {name: value for name, value in options.given().items() if name in chosen.options}
    return chosen.at_load(LayerOptions(**{**general, **override.given()}))


def _method(name: str) -> type[Method]:
    if name not in SCHEMES:
        raise ConfigError(
            f"--additional-config quantkit: method = {name!r} is unknown; it must be one of "
            f"{', '.join(SCHEMES)}."
        )
    return get_method(name)
