"""What every group of layers runs, and what refuses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_quantkit.check.findings import Findings
from vllm_quantkit.check.kernels import DTYPES, foresee
from vllm_quantkit.check.report import GroupCheck, PlainGroup
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.footprint import LayerGroup
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.schemes.invariance import check_invariant
from vllm_quantkit.schemes.served_layers import describe
from vllm_quantkit.schemes.w8a8 import check_cuts

SIXTEEN = "16-bit product"
"""Layers that stay as they are; vLLM multiplies them."""


class LayerChecks:
    """The plugin's view of a model's layers on a device."""

    def __init__(
        self,
        device: Device,
        dtype: str,
        ranks: int,
        stats: Mapping[str, Tensor],
        findings: Findings,
        *,
        batch_invariant: bool,
    ) -> None:
        """`stats`: checkpoint layer to the largest input of each of its channels."""
        self._device, self._dtype, self._ranks = device, dtype, ranks
        self._stats, self._findings = stats, findings
        self._batch_invariant = batch_invariant

    def ours(self, group: LayerGroup) -> GroupCheck:
        """Layers that the plugin serves, or leaves in 16 bits."""
        if group.refused:
            self._findings.block("layers", group.refused, group.name)
            return checked(group, "", group.refused)
        if group.spec is None:
            return checked(group, SIXTEEN, "no rule quantises it")
        refused = len(self._findings.blockers)
        self._check_cuts(group)
        self._check_invariant(group)
        if len(self._findings.blockers) > refused:
            return checked(group, "", self._findings.blockers[-1].sentence)
        fixed = any(member in self._stats for member in group.members)
        found = foresee(group.spec, self._device, self._dtype, fixed_outliers=fixed)
        self._findings.warn(found.warning)
        return checked(group, found.name, found.reason)

    def _check_cuts(self, group: LayerGroup) -> None:
        """Ranks cut between the blocks of weights whose activations are quantised."""
        spec = group.spec
        if spec is None or spec.activation is None or group.parallel != "row":
            return
        with self._findings.attempt("tensor-parallel", group.name):
            try:
                check_cuts(group.shape.in_features, self._ranks, spec.weight.group_size)
            except UnsupportedScheme as error:
                raise UnsupportedScheme(f"layer {group.name} cannot be served: {error}.") from error

    def _check_invariant(self, group: LayerGroup) -> None:
        if not self._batch_invariant or group.spec is None:
            return
        fixed = any(member in self._stats for member in group.members)
        device = torch.device("cuda" if self._device.kind == "cuda" else "cpu")
        dtype = DTYPES[self._dtype]
        with self._findings.attempt("batch-invariance", group.name):
            check_invariant(group.name, group.spec, device, dtype, fixed_outliers=fixed)


def vllms(group: LayerGroup, plain: PlainGroup) -> GroupCheck:
    """Layers that vLLM serves itself."""
    kernel = plain.kernel if group.spec is None or not plain.kernel else f"vLLM: {plain.kernel}"
    return checked(group, kernel, plain.reason)


def checked(group: LayerGroup, kernel: str, reason: str) -> GroupCheck:
    """What is said of a group."""
    return GroupCheck(
        layers=group.name,
        members=group.members,
        count=group.count,
        blocks=group.blocks,
        scheme=describe(group.spec),
        shape=group.shape,
        rank_shape=group.rank_shape,
        kernel=kernel,
        reason=reason,
    )


def refused_by_vllm(groups: Sequence[PlainGroup], findings: Findings) -> None:
    """Blockers of a checkpoint that is left to vLLM, which does not serve it."""
    for group in groups:
        if group.serves == "no":
            sentence = f"vLLM itself does not serve {group.layers}: {group.reason}"
            findings.block("layers", f"{sentence}; add --quantization quantkit.", group.layers)
