"""What loading did, said once: kernels, layers left in 16 bits, layers nobody took."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from vllm.logger import init_logger

from vllm_quantkit.integration import compat
from vllm_quantkit.integration.memory import MemoryWatch
from vllm_quantkit.integration.names import LayerNames, shorten
from vllm_quantkit.options import Options
from vllm_quantkit.spec import SchemeSpec

# vLLM formats and levels only loggers below its own name.
logger = init_logger("vllm.quantkit")


GRIDS = {
    "none": "grids over the full range",
    "clip": "grids of least squared error (clip)",
    "hqq": "half-quadratic grids (hqq)",
}
"""`quantize.methods.data_free.Refinement` in words."""


@dataclass
class LoadReport:
    """Counts a model's layers while it loads; checks and speaks when the last one is ready.

    Attributes:
        method: the name given to `--quantization`.
        names: the checkpoint's layers.
        num_layers: decoder layers of the model.
        options: the user's, once they are read.
        at_load: True where a 16-bit model is quantised, so that every layer left over is in 16
            bits and no concern.
        memory: measured where a 16-bit model is quantised.
    """

    method: str
    names: LayerNames
    num_layers: int | None = None
    options: Options = field(default_factory=Options)
    at_load: bool = False
    memory: MemoryWatch = field(default_factory=MemoryWatch)
    _expected: set[str] = field(default_factory=set)
    _ready: dict[str, str] = field(default_factory=dict)
    _errors: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    _unquantized: list[str] = field(default_factory=list)
    _told: bool = False

    def expect(self, prefix: str) -> None:
        """A quantised layer was created."""
        self._expected.add(prefix)
        if self.at_load:
            self.memory.begin()

    def leave_unquantized(self, prefix: str) -> None:
        """A linear layer stays in 16 bits."""
        self._unquantized.append(prefix)

    def quantised(self, label: str, spec: SchemeSpec, error: float) -> None:
        """A 16-bit weight was quantised as `spec` says, with this relative error."""
        what = f"{spec.weight.describe()}, {GRIDS[spec.variant]}"
        self._errors[what][label.removesuffix(".weight")] = error

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
        if not self._expected:  # no layer of the model is quantised
            return []
        # A pipeline stage takes its own layers only.
        if not self.at_load and not compat.is_pipeline_parallel():
            self.names.check_all_claimed(self.num_layers, self.options.ignore_layers)
        return self.names.ignored(self.options.ignore_layers)

    def ready(self, prefix: str, kernel: str, finish: Callable[[], str]) -> None:
        """A layer is packed. After the last one, once, loading is finished and summarised.

        Args:
            prefix: of the layer.
            kernel: what runs it.
            finish: completes the model, and says what it did in a sentence or not at all.

        Raises:
            CheckpointError: see `close_audit`; not every model's loader asks for it before.
        """
        self._ready[prefix] = kernel
        if self._told or self._expected != self._ready.keys():
            return
        self._told = True  # a reload passes here again
        self.close_audit()
        did = finish()
        self._summarise()
        if did:
            logger.info("%s: %s", self.method, did)

    def _summarise(self) -> None:
        for kernel, count in Counter(self._ready.values()).most_common():
            logger.info("%s: %d layers run %s.", self.method, count, kernel)
        for what, errors in self._errors.items():
            self._tell_errors(what, errors)
        if self._errors:
            logger.info("%s: %s.", self.method, self.memory.describe())
        if self._unquantized:
            logger.warning(
                "%s: %d linear layers stay in 16 bits: %s.",
                self.method,
                len(self._unquantized),
                shorten(self._unquantized),
            )

    def _tell_errors(self, what: str, errors: Mapping[str, float]) -> None:
        worst = max(errors, key=errors.__getitem__)
        logger.info(
            "%s: quantised at load to %s; relative weight error %.2f %% on average, %.2f %% in %s.",
            self.method,
            what,
            100 * sum(errors.values()) / len(errors),
            100 * errors[worst],
            worst,
        )
