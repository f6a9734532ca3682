"""The `QuantizationConfig` classes that vLLM sees, one for each registered method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.formats import get_format
from vllm_quantkit.integration import compat
from vllm_quantkit.integration.context import LoadContext
from vllm_quantkit.integration.kv_treatment import HEAD_TENSORS
from vllm_quantkit.integration.linear import QuantkitLinearMethod
from vllm_quantkit.integration.names import LayerNames
from vllm_quantkit.integration.report import LoadReport
from vllm_quantkit.options import LayerOptions, read_options
from vllm_quantkit.schemes import SCHEMES, Method, get_method
from vllm_quantkit.schemes.at_load import load_rules, refuse_load_options
from vllm_quantkit.schemes.linear import linear_scheme
from vllm_quantkit.schemes.served_layers import MIN_CAPABILITY, common_scheme, experts_refused
from vllm_quantkit.spec import LayerRules, SchemeSpec


class QuantkitConfig(QuantizationConfig):  # type: ignore[misc]
    """Maps a checkpoint's rules onto vLLM's layers.

    Attributes:
        method_name: the name it is registered under.
        rules: scheme by checkpoint layer; None for a 16-bit model until its first layer is built.
        names: the checkpoint's layers.
        report: what loading did.
    """

    method_name: ClassVar[str] = "quantkit"

    def __init__(self, rules: LayerRules | None = None) -> None:
        super().__init__()
        # vLLM passes nothing for a model without a quantization_config.
        if rules is None:
            self.method().at_load(LayerOptions())
        self.rules = rules
        self.names = LayerNames()
        self.report = LoadReport(self.method_name, self.names, at_load=rules is None)
        self._context: LoadContext | None = None

    @classmethod
    def method(cls) -> type[Method]:
        """The scheme class behind this config."""
        return get_method(cls.method_name)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantkitConfig:
        """Parse a checkpoint's `quantization_config`; refuses before any weight is read.

        Raises:
            ConfigError, UnsupportedScheme: one sentence with the value seen and the fix.
        """
        return cls(cls.method().rules(config) if config else None)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint that the user asked us to serve.

        The user's word decides even for a checkpoint we then refuse: our refusal says what to do.
        """
        return cls.method_name if user_quant == cls.method_name else None

    def get_name(self) -> str:
        """The registered name."""
        return self.method_name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """float16, bfloat16 and float32."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return MIN_CAPABILITY

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Where older checkpoints keep their config, beside config.json.

        None for methods that have no such checkpoints: vLLM takes a model without any of the files
        for damaged, but it may be a 16-bit model to be quantised at load.
        """
        return list(cls.method().config_files)

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Drop no tensor: activation order is served."""
        return compat.keep_every_tensor()

    def get_cache_scale_mapper(self) -> Any:
        """Drop what the model does not take: layers that the user ignores, and tensors that are
        read beside their layer's codes. The loader asks once the model is built.

        Raises:
            CheckpointError: the checkpoint has quantised layers that the model did not take.
        """
        mapper = compat.without_layers(super().get_cache_scale_mapper(), self.report.close_audit())
        schemes = self.rules.schemes if self.rules is not None else ()
        companions = [name for spec in schemes for name in get_format(spec.dialect).COMPANIONS]
        mapper = compat.without_tensors(mapper, companions)
        return compat.without_exactly(mapper, self.names.head_tensors(HEAD_TENSORS))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Audit the checkpoint's headers before a weight is read."""
        self.names.read(model_name, revision)
        if self.rules is not None:
            self.names.audit(self.rules)
        text_config = getattr(hf_config, "text_config", hf_config)
        self.report.num_layers = getattr(text_config, "num_hidden_layers", None)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn how the model renames the checkpoint's layers."""
        self.names.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The linear method of a layer; 16 bits where the rules or the checkpoint say so.

        Raises:
            UnsupportedScheme: a mixture of experts, partitions of a merged layer that differ, or
                attention that an INT4 KV cache does not serve.
        """
        context = self._start()
        if isinstance(layer, LinearBase | ParallelLMHead):
            return self._linear_method(layer, prefix, context)
        if compat.is_attention_layer(layer):
            return context.kv_cache.method(layer, prefix)
        if compat.is_moe_layer(layer) and self._expert_scheme(prefix) is not None:
            raise experts_refused(self.method_name, prefix)
        return None

    def _start(self) -> LoadContext:
        """What the layers share, made when the first is asked for: options are known by then.

        Raises:
            ConfigError, UnsupportedScheme: an option cannot be served.
        """
        if self._context is None:
            method, options = self.method(), read_options(compat.additional_config())
            if self.report.at_load:
                self.rules = load_rules(method, options)
            else:
                refuse_load_options(method, options)
            self.report.options = options
            self._context = LoadContext(method, options, self.names, self.report)
        return self._context

    def _linear_method(
        self, layer: nn.Module, prefix: str, context: LoadContext
    ) -> QuantizeMethodBase | None:
        partitions = self._partitions(prefix)
        spec = common_scheme(prefix, {name: self._scheme(name) for name in partitions})
        if spec is not None:
            return QuantkitLinearMethod(linear_scheme(spec), prefix, partitions, context)
        if isinstance(layer, ParallelLMHead):
            return None
        self.report.leave_unquantized(prefix)
        return UnquantizedLinearMethod()

    def _partitions(self, prefix: str) -> tuple[str, ...]:
        """Model-side names of the checkpoint layers merged into `prefix`."""
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        return tuple(f"{parent}.{name}" if parent else name for name in leaves)

    def _expert_scheme(self, prefix: str) -> SchemeSpec | None:
        return self._scheme(f"{prefix}.0.up_proj")

    def _scheme(self, name: str) -> SchemeSpec | None:
        assert self.rules is not None
        return self.names.scheme_for(name, self.rules)


class AutoConfig(QuantkitConfig):
    """`quantkit`: also claims, unasked, what vLLM itself would refuse."""

    method_name = "quantkit"

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim what the user gave us, and with no flag what we serve and vLLM does not."""
        if user_quant is None and cls._only_we_serve(hf_quant_cfg, hf_config):
            return cls.method_name
        return super().override_quantization_method(hf_quant_cfg, user_quant, hf_config)

    @classmethod
    def _only_we_serve(cls, config: Mapping[str, Any], hf_config: Any) -> bool:
        try:
            rules = cls.method().rules(config)
        except QuantkitError:
            return False
        return not compat.serves(config, rules, hf_config)


def _config_class(name: str) -> type[QuantkitConfig]:
    """A config class for a registered method; workers find it by its name in this module."""
    if name == AutoConfig.method_name:
        return AutoConfig
    class_name = "".join(part.capitalize() for part in name.split("-")) + "Config"
    return type(class_name, (QuantkitConfig,), {"method_name": name, "__module__": __name__})


CONFIGS: dict[str, type[QuantkitConfig]] = {name: _config_class(name) for name in SCHEMES}
globals().update({config.__name__: config for config in CONFIGS.values()})
