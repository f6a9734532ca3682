"""What loading did, said once: kernels, layers left in 16 bits, layers nobody took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from vllm.logger import init_logger

from vllm_quantkit.integration import compat
from vllm_quantkit.integration.names import LayerNames, shorten
from vllm_quantkit.options import Options, read_options

# vLLM formats and levels only loggers below its own name.
logger = init_logger("vllm.quantkit")


@dataclass
class LoadReport:
    """Counts a model's layers while it loads; checks and speaks when the last one is ready.

    Attributes:
        method: the name given to `--quantization`.
        names: the checkpoint's layers.
        num_layers: decoder layers of the model.
    """

    method: str
    names: LayerNames
    num_layers: int | None = None
    _expected: set[str] = field(default_factory=set)
    _ready: dict[str, str] = field(default_factory=dict)
    _unquantized: list[str] = field(default_factory=list)
    _options: Options | None = None
    _told: bool = False

    def expect(self, prefix: str) -> None:
        """A quantised layer was created. Options are read here, before any weight is."""
        self._expected.add(prefix)
        if self._options is None:
            self._options = read_options(compat.additional_config())

    def leave_unquantized(self, prefix: str) -> None:
        """A linear layer stays in 16 bits."""
        self._unquantized.append(prefix)

    def check_bias(self, layer: nn.Module, partitions: Iterable[str]) -> None:
        """No checkpoint bias is lost, see `LayerNames.check_no_bias`."""
        if getattr(layer, "bias", None) is None:
            for name in partitions:
                self.names.check_no_bias(name)

    def close_audit(self) -> list[str]:
        """The model is built: no quantised layer is left over. Returns layers not to load.

        Raises:
            CheckpointError: the checkpoint has quantised layers that the model did not take.
        """
        if self._options is None:  # no layer of the model is quantised
            return []
        # A pipeline stage takes its own layers only.
        if not compat.is_pipeline_parallel():
            self.names.check_all_claimed(self.num_layers, self._options.ignore_layers)
        return self.names.ignored(self._options.ignore_layers)

    def ready(self, prefix: str, kernel: str) -> None:
        """A layer is packed. After the last one, once, loading is summarised.

        Raises:
            CheckpointError: see `close_audit`; not every model's loader asks for it before.
        """
        self._ready[prefix] = kernel
        if self._told or self._expected != self._ready.keys():
            return
        self._told = True  # a reload passes here again
        self.close_audit()
        self._summarise()

    def _summarise(self) -> None:
        for kernel, count in Counter(self._ready.values()).most_common():
            logger.info("%s: %d layers run %s.", self.method, count, kernel)
        if self._unquantized:
            logger.warning(
                "%s: %d linear layers stay in 16 bits: %s.",
                self.method,
                len(self._unquantized),
                shorten(self._unquantized),
            )
