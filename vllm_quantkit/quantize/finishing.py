"""The last step of a run: report, model card, config and weights become a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from vllm_quantkit._safetensors import TensorHeader, read_headers
from vllm_quantkit.quantize.output.model_card import card_section, with_section
from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.quantize.output.report import (
    REPORT_FILE,
    CalibrationSummary,
    Quality,
    Report,
    Resources,
    build_report,
    peak_device_bytes,
    peak_host_bytes,
    render_report,
)
from vllm_quantkit.quantize.output.verify import verify_checkpoint
from vllm_quantkit.quantize.output.workspace import Workspace
from vllm_quantkit.quantize.plan import Plan
from vllm_quantkit.terminal import Tick

CARD = "README.md"


@dataclass(frozen=True)
class Finisher:
    """Writes what a run has made.

    Attributes:
        source: the 16-bit model's folder.
        model_name: what the report calls it.
        base_model: its name on the hub; None where that is not known.
        summary: of what was calibrated on; None where nothing was.
        device: that the run used.
    """

    source: Path
    model_name: str
    base_model: str | None
    summary: CalibrationSummary | None
    device: torch.device

    def write(
        self,
        plan: Plan,
        workspace: Workspace,
        records: Sequence[BlockRecord],
        quality: Quality | None,
        seconds: Mapping[str, float],
        tick: Tick,
    ) -> Report:
        """The finished folder in one step, once what was written reads back as measured.

        `tick` is called when all is written and not yet read back.

        Raises:
            CheckpointError: the disk is full, or what was read back differs.
        """
        before, made = read_headers(self.source), workspace.tensors()
        replaced = {f"{layer.stored}.weight" for layer in plan.layers}
        replaced |= before.keys() & made.keys()
        kept = [header for name, header in before.items() if name not in replaced]
        resources = Resources(
            seconds=dict(seconds),
            host_bytes=peak_host_bytes(),
            device_bytes=peak_device_bytes(self.device),
            bytes_before=sum(map(_nbytes, before.values())),
            bytes_after=sum(map(_nbytes, (*kept, *made.values()))),
            parameters=sum(prod(header.shape) for header in before.values()),
        )
        report = build_report(
            self.model_name,
            records,
            resources,
            device=self.device,
            quality=quality,
            calibration=self.summary,
            base_model=self.base_model,
        )

        def check(folder: Path) -> None:
            tick()
            verify_checkpoint(folder, records, plan.schemes)

        workspace.finish(
            self.source,
            replaced,
            {"quantization_config": plan.config},
            {REPORT_FILE: render_report(report), CARD: self._card(report)},
            check=check,
        )
        return report

    def _card(self, report: Report) -> str:
        path = self.source / CARD
        readme = path.read_text(encoding="utf-8") if path.is_file() else ""
        return with_section(readme, card_section(report), self.base_model)


def _nbytes(header: TensorHeader) -> int:
    return prod(header.shape) * header.dtype.itemsize
