"""Everything that decides whether a model will be served, found before an engine is started."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vllm_quantkit.check.cache import ServedCache, served_cache
from vllm_quantkit.check.findings import Findings
from vllm_quantkit.check.layers import LayerChecks, refused_by_vllm, vllms
from vllm_quantkit.check.memory import (
    Change,
    changes,
    does_not_fit,
    memory_check,
    workload_of,
)
from vllm_quantkit.check.plain_check import plain_check, unread
from vllm_quantkit.check.release import Release, find_release
from vllm_quantkit.check.report import CheckReport, GroupCheck, MemoryCheck, PlainCheck
from vllm_quantkit.check.request import CheckRequest
from vllm_quantkit.check.serve_command import serve_command
from vllm_quantkit.check.serving import serving_method
from vllm_quantkit.check.surroundings import check_surroundings
from vllm_quantkit.check.tensor_parallel import check_ranks
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.footprint import LayerGroup, Model, footprint, layer_groups, read_model
from vllm_quantkit.footprint.kv_cache import WORDS
from vllm_quantkit.hardware.catalogue import find_device
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.kv_rules import INT4
from vllm_quantkit.options import Options, read_options
from vllm_quantkit.quantize.activation_stats import read_activation_stats
from vllm_quantkit.schemes import Method, get_method
from vllm_quantkit.schemes.smoothquant import HOW_TO_SMOOTH


def preflight(request: CheckRequest) -> CheckReport:
    """Check a model against a device, a vLLM and the flags it would be served with.

    Raises:
        ConfigError: no such device, dtype, or version of vLLM.
        CheckpointError: there is no such model, or its config.json or headers cannot be read.
    """
    device, release = find_device(request.gpu), find_release(request.vllm)
    model = read_model(request.model, request.revision)
    return Preflight(request, model, device, release).run()


class Preflight:
    """One check; each step adds to what is found."""

    def __init__(
        self, request: CheckRequest, model: Model, device: Device, release: Release
    ) -> None:
        self._request, self._model = request, model
        self._device, self._release = device, release
        self._findings, self._options = Findings(), Options()
        self._possible: list[Change] = []
        facts = model.facts
        self._dtype = workload_of(request, device).activation_dtype(facts)
        self._method = serving_method(request.quantization, model, device, release, self._dtype)

    def run(self) -> CheckReport:
        """Every step, and what they found."""
        request, findings = self._request, self._findings
        check_surroundings(request, self._model, self._device, self._release, findings)
        with findings.attempt("options"):
            self._options = read_options(request.parsed_config())
        plain = unread("the model does not divide into such ranks.")
        groups: tuple[GroupCheck, ...] = ()
        divides = len(findings.blockers)
        with findings.attempt("tensor-parallel"):
            check_ranks(self._model.facts, request.tp)
        if len(findings.blockers) == divides:
            plain, groups = self._layers()
        cache = self._cache()
        memory = None if cache is None or not groups else self._memory(cache)
        return self._report(groups, plain, cache, memory)

    def _layers(self) -> tuple[PlainCheck, tuple[GroupCheck, ...]]:
        """What plain vLLM does with the layers as stored, and what will be done."""
        try:
            stored = layer_groups(self._model, None, tp=self._request.tp)
        except QuantkitError as error:
            plain, stored = unread(str(error)), ()
        else:
            plain = self._plain(stored)
        return plain, self._checked(stored, plain)

    def _plain(self, stored: tuple[LayerGroup, ...]) -> PlainCheck:
        word = self._request.kv_cache_dtype
        surroundings = self._device, self._release, self._dtype
        return plain_check(self._model, stored, *surroundings, word)

    def _checked(self, stored: tuple[LayerGroup, ...], plain: PlainCheck) -> tuple[GroupCheck, ...]:
        if self._method is None:
            refused_by_vllm(plain.groups, self._findings)
            self._say_unknown(plain)
            return tuple(map(vllms, stored, plain.groups))
        groups: tuple[LayerGroup, ...] = ()
        with self._findings.attempt(None):
            groups = layer_groups(self._model, self._method, self._options, self._request.tp)
        checks = LayerChecks(
            self._device,
            self._dtype,
            self._request.tp,
            self._statistics(),
            self._findings,
            batch_invariant=self._request.batch_invariant,
        )
        return tuple(map(checks.ours, groups))

    def _say_unknown(self, plain: PlainCheck) -> None:
        if plain.serves == "unknown":
            self._findings.warn(f"whether vLLM serves this checkpoint itself is {plain.summary}")
        if self._options != Options():
            self._findings.warn(
                "vLLM serves this model itself, so the options of --additional-config quantkit do "
                "nothing; add --quantization."
            )

    def _statistics(self) -> Mapping[str, Tensor]:
        """The user's largest inputs, by checkpoint layer."""
        path = self._options.activation_stats
        if path is None:
            at_load = self._model.facts.quantization_config is None
            smooths = at_load and get_method(str(self._method)).smooths
            self._findings.warn(HOW_TO_SMOOTH if smooths else "")
            return {}
        with self._findings.attempt("options"):
            return read_activation_stats(path)
        return {}

    def _cache(self) -> ServedCache | None:
        """None where nothing serves it, or where it is one of vLLM's that is not known here."""
        word = self._request.kv_cache_dtype
        if self._device.kind == "cuda" and word not in WORDS:
            self._findings.warn(
                f"--kv-cache-dtype {word} is vLLM's own and not known here, so neither the KV "
                f"cache nor what fits is told."
            )
            return None
        if word == INT4 and self._method is None and self._device.kind == "cuda":
            self._findings.warn(
                f"vLLM's own cache of --kv-cache-dtype {word} is counted as large as the plugin's."
            )
        with self._findings.attempt("kv-cache"):
            return self._cache_of(self._request, self._method)
        return None

    def _cache_of(self, request: CheckRequest, method: str | None) -> ServedCache:
        chosen: type[Method] | None = None if method is None else get_method(method)
        word, options = request.kv_cache_dtype, self._options
        device = self._device if request.gpu == self._request.gpu else find_device(request.gpu)
        return served_cache(self._model, chosen, options, word, device, self._release)

    def _memory(self, cache: ServedCache) -> MemoryCheck | None:
        """None where the model would not be served anyway, and cannot be weighed therefore."""
        elsewhere = Findings() if self._findings.blockers else self._findings
        with elsewhere.attempt("memory"):
            found = self._weigh(self._request)
            if not found.fits:
                self._block_memory(found)
            return found
        return None

    def _weigh(self, request: CheckRequest) -> MemoryCheck:
        """Memory of this request, or of one changed.

        Raises:
            QuantkitError: it would not be served.
        """
        same = request.quantization == self._request.quantization
        method = self._method if same else request.quantization
        device = self._device if request.gpu == self._request.gpu else find_device(request.gpu)
        check_ranks(self._model.facts, request.tp)
        found = footprint(
            self._model,
            method=method,
            device=device,
            kv=self._cache_of(request, method).kv,
            options=self._options,
            tp=request.tp,
            workload=workload_of(request, device),
        )
        return memory_check(found, self._model.facts, request, device)

    def _block_memory(self, found: MemoryCheck) -> None:
        request, facts, device = self._request, self._model.facts, self._device
        ours = self._method is not None
        self._possible = changes(request, found, facts, device, self._weigh, ours=ours)
        sentence = does_not_fit(found, request, device)
        fix = " What would fit: " + "; or ".join(change.words for change in self._possible) + "."
        self._findings.block("memory", sentence + (fix if self._possible else ""))

    def _command(self) -> str:
        """What starts the engine: as asked, or with the one change that makes the model fit."""
        subjects = {blocker.subject for blocker in self._findings.blockers}
        if not subjects:
            return serve_command(self._request)
        change = next((change for change in self._possible if change.applies), None)
        if subjects != {"memory"} or change is None:
            return ""
        return serve_command(self._request.model_copy(update=change.flags))

    def _report(
        self,
        groups: tuple[GroupCheck, ...],
        plain: PlainCheck,
        cache: ServedCache | None,
        memory: MemoryCheck | None,
    ) -> CheckReport:
        request = self._request
        return CheckReport(
            serves=not self._findings.blockers,
            model=request.model,
            architecture=self._model.facts.architecture,
            quantization=request.quantization,
            served_by="vllm" if self._method is None else "quantkit",
            device=self._device.name,
            tensor_parallel_size=request.tp,
            vllm=str(self._release),
            dtype=self._dtype,
            blockers=tuple(self._findings.blockers),
            warnings=tuple(self._findings.warnings),
            groups=groups,
            kv_cache=None
            if cache is None
            else cache.told(self._model.facts, request.tp, self._dtype),
            memory=memory,
            plain_vllm=plain,
            command=self._command(),
        )
