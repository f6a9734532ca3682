"""What a compressed-tensors config says of the activations of one group of layers."""

from __future__ import annotations

from quantkit_kernels.act_quant.rows import PER_TENSOR, PER_TOKEN, RowCode
from vllm_quantkit.formats._compressed_tensors_weights import Args
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, WeightSpec

ROW_CODES: dict[str, RowCode] = {"int": "int8", "float": "e4m3"}
"""`type` to what the codes of the activations are."""

REQUANTISE = "Quantise again with 'dynamic' true and strategy 'token'."


class ActivationFields(Args):
    """How the activations of one group are quantised."""

    dynamic: bool | str = False

    def spec(self, weight: WeightSpec) -> ActivationSpec:
        """These numerics, for layers with this weight.

        Raises:
            ConfigError: keys contradict each other.
            UnsupportedScheme: numerics, or a pair of numerics, that are not served.
        """
        self._check_numbers()
        self._check_pair(weight)
        group_size = self._group_size()
        self._check_groups(weight, group_size)
        return ActivationSpec(
            code=ROW_CODES[self.kind],
            dynamic=bool(self.dynamic),
            group_size=group_size,
            symmetric=self.symmetric,
        )

    def _check_numbers(self) -> None:
        if self.kind not in ROW_CODES:
            raise self.malformed("type", self.type, self.allowed["type"])
        if self.num_bits != 8:
            raise self.unserved(
                "num_bits",
                self.num_bits,
                "activations of 8 bits",
                "Quantise again with 8-bit activations, or none.",
            )
        if self.dynamic == "local":
            raise self.unserved("dynamic", "local", "true and false", REQUANTISE)
        if not isinstance(self.dynamic, bool):
            raise self.malformed("dynamic", self.dynamic, self.allowed["dynamic"])

    def _check_pair(self, weight: WeightSpec) -> None:
        """The weight is one that 8-bit activations of this type are multiplied with."""
        served = "8-bit weights of the activations' type"
        kind = "int" if weight.code_type == "int" else "float"
        if kind != self.kind:
            raise self.unserved("type", self.type, f"{served}, here {kind!r}", "Use one type.")
        if weight.bits != 8:
            fix = "Quantise again with such weights, or with input_activations null."
            seen, allowed = f"{weight.bits} bits", f"{served} with input_activations"
            raise self.unserved("weights", seen, allowed, fix)
        if kind == "int" and weight.group_size != PER_CHANNEL:
            raise self.unserved(
                "group_size",
                weight.group_size,
                "integer weights per channel or tensor with input_activations",
                "Quantise again with strategy 'channel', or with input_activations null.",
            )
        if weight.act_order:
            raise self.unserved(
                "actorder",
                "group",
                "groups in order with input_activations",
                "Quantise again with actorder 'weight'.",
            )

    def _group_size(self) -> int:
        strategy = self.chosen_strategy
        sizes = {"tensor": PER_TENSOR}
        if self.dynamic:
            sizes |= {"token": PER_TOKEN, "group": self.group_size or 0}
        if strategy not in sizes:
            when = "with" if self.dynamic else "without"
            served = ", ".join(repr(name) for name in sizes)
            raise self.unserved("strategy", strategy, f"{served} {when} 'dynamic'", REQUANTISE)
        self.check_group_size()
        if not self.symmetric and (self.kind == "float" or (self.dynamic and strategy != "token")):
            served = "zero-points of integers that are static or per token"
            raise self.unserved("symmetric", False, served, "Quantise again with symmetric true.")
        return sizes[strategy]

    def _check_groups(self, weight: WeightSpec, group_size: int) -> None:
        if group_size > 0 and weight.group_size not in (PER_CHANNEL, group_size):
            raise self.unserved(
                "group_size",
                group_size,
                f"the weights' groups of {weight.group_size} for activations, too",
                "Quantise again with groups of one size.",
            )
