"""Devices by name: what their makers publish, and what is in this machine.

Rates are those of dense products with 32-bit sums: data sheets that quote 2:4 sparsity are halved.
Memory is what programs see: 1/16 of GDDR6 holds error-correcting codes on data-centre cards.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.hardware.apple import APPLE_DEVICES
from vllm_quantkit.hardware.device import Device, Number
from vllm_quantkit.hardware.machine import this_cpu, this_gpu

GIB = 1 << 30

NVIDIA = "https://www.nvidia.com/en-us/data-center"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
BLACKWELL_RTX = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
    "nvidia-rtx-blackwell-gpu-architecture.pdf"
)
AMPERE_RTX = (
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)
H20 = "https://willitrunai.com/es/gpus/h20-96gb"
"""NVIDIA publishes no data sheet for it."""

ECC = 15 / 16
"""Share of GDDR6 that programs see where error-correcting codes lie in the same memory."""


def _gpu(
    name: str,
    gib: float,
    gigabytes_per_second: float,
    capability: tuple[int, int],
    source: str,
    **tera: float,
) -> Device:
    """A CUDA GPU; `tera` holds 10^12 operations a second by number."""
    peaks: dict[Number, float] = {
        number: tera[number] * 1e12 for number in ("bf16", "fp8", "int8") if number in tera
    }
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=int(gib * GIB),
        bandwidth=gigabytes_per_second * 1e9,
        capability=capability,
        peaks=peaks,
        source=source,
    )


HOPPER = {"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9}
AMPERE = {"bf16": 312.0, "int8": 624.0}

GPUS: dict[str, Device] = {
    "b200": _gpu(
        "NVIDIA B200", 179, 7700, (10, 0), f"{NVIDIA}/hgx/", bf16=2250, fp8=4500, int8=4500
    ),
    "h200": _gpu("NVIDIA H200", 140, 4800, (9, 0), f"{NVIDIA}/h200/", **HOPPER),
    "h100": _gpu("NVIDIA H100 SXM", 79.6, 3350, (9, 0), f"{NVIDIA}/h100/", **HOPPER),
    "h100-pcie": _gpu(
        "NVIDIA H100 PCIe", 79.6, 2000, (9, 0), f"{NVIDIA}/h100/", bf16=756, fp8=1513, int8=1513
    ),
    "h20": _gpu("NVIDIA H20", 95.6, 4000, (9, 0), H20, bf16=148, fp8=296, int8=296),
    "a100-80": _gpu("NVIDIA A100 80GB", 80, 2039, (8, 0), f"{NVIDIA}/a100/", **AMPERE),
    "a100-40": _gpu("NVIDIA A100 40GB", 40, 1555, (8, 0), f"{NVIDIA}/a100/", **AMPERE),
    "l40s": _gpu(
        "NVIDIA L40S", 48 * ECC, 864, (8, 9), f"{NVIDIA}/l40s/", bf16=362, fp8=733, int8=733
    ),
    "l40": _gpu("NVIDIA L40", 48 * ECC, 864, (8, 9), f"{NVIDIA}/l40/", bf16=181, fp8=362, int8=362),
    "l4": _gpu("NVIDIA L4", 24 * ECC, 300, (8, 9), f"{NVIDIA}/l4/", bf16=121, fp8=242, int8=242),
    "a40": _gpu("NVIDIA A40", 48 * ECC, 696, (8, 6), f"{NVIDIA}/a40/", bf16=149.7, int8=299.3),
    "a30": _gpu("NVIDIA A30", 24, 933, (8, 0), f"{NVIDIA}/products/a30-gpu/", bf16=165, int8=330),
    "a10": _gpu(
        "NVIDIA A10", 24 * ECC, 600, (8, 6), f"{NVIDIA}/products/a10-gpu/", bf16=125, int8=250
    ),
    "rtx-5090": _gpu(
        "NVIDIA GeForce RTX 5090", 32, 1792, (12, 0), BLACKWELL_RTX, bf16=209.5, fp8=419, int8=838
    ),
    "rtx-4090": _gpu(
        "NVIDIA GeForce RTX 4090", 24, 1008, (8, 9), ADA, bf16=165.2, fp8=330.3, int8=660.6
    ),
    "rtx-3090": _gpu("NVIDIA GeForce RTX 3090", 24, 936, (8, 6), AMPERE_RTX, bf16=71, int8=284),
    "t4": _gpu("NVIDIA T4", 16 * ECC, 320, (7, 5), f"{NVIDIA}/tesla-t4/", bf16=65, int8=130),
    "v100": _gpu("NVIDIA V100 32GB", 32, 900, (7, 0), f"{NVIDIA}/v100/", bf16=125),
    "v100-16": _gpu("NVIDIA V100 16GB", 16, 900, (7, 0), f"{NVIDIA}/v100/", bf16=125),
}

DEVICES: dict[str, Device] = {**GPUS, **APPLE_DEVICES}
"""Short name to device."""

ALIASES = {
    "h100sxm": "h100",
    "h100sxm5": "h100",
    "h10080gbhbm3": "h100",
    "h100pcie": "h100-pcie",
    "h200sxm": "h200",
    "a100": "a100-80",
    "a10080gb": "a100-80",
    "a10040gb": "a100-40",
    "a100sxm480gb": "a100-80",
    "a100sxm440gb": "a100-40",
    "a10080gbpcie": "a100-80",
    "a100pcie40gb": "a100-40",
    "5090": "rtx-5090",
    "4090": "rtx-4090",
    "3090": "rtx-3090",
    "v10032": "v100",
    "v100sxm232gb": "v100",
    "v10016gb": "v100-16",
    "v100sxm216gb": "v100-16",
}
"""Other names, as `_plain` makes them, to short names."""

WORDS = re.compile(r"nvidia|geforce|tesla|apple|tensor core|\bgpu\b")
"""What names may have besides."""

MEMORY = re.compile(r"^(.*?\D)(\d+) ?gb$")
"""Behind an Apple chip: how much memory the machine has."""


def find_device(name: str | None) -> Device:
    """The device called `name`, whatever the case and punctuation.

    Args:
        name: of `DEVICES`, or an alias; Apple chips may have their memory behind (`m4-max 64GB`);
            `cpu` for this machine's CPUs; `this`, or None, for its GPU if it has one, else its
            CPUs.

    Raises:
        ConfigError: no such device; names the closest ones.
    """
    if name is None or name.lower() == "this":
        return _published(this_gpu() or this_cpu())
    if name.lower() == "cpu":
        return _published(this_cpu())
    found = known_device(name)
    if found is None:
        raise _unknown(name)
    return found


def _published(found: Device) -> Device:
    """A device of this machine with its maker's figures, where they are known."""
    known = known_device(found.name)
    if known is None:
        return found
    own = {"name": found.name, "memory_bytes": found.memory_bytes, "isa": found.isa}
    return known.model_copy(update={**own, "cores": found.cores})


def known_device(name: str) -> Device | None:
    """The catalogue's device called `name`, as its driver or its users say it; None without one."""
    plain = _plain(name)
    short = ALIASES.get(plain) or {_plain(key): key for key in DEVICES}.get(plain)
    if short is not None:
        return DEVICES[short]
    sized = MEMORY.match(name.lower().strip())
    if sized is None:
        return None
    chip = {_plain(key): found for key, found in APPLE_DEVICES.items()}.get(_plain(sized[1]))
    memory = {"memory_bytes": int(sized[2]) * GIB}
    return None if chip is None else chip.model_copy(update=memory)


def _plain(name: str) -> str:
    """Lower case, letters and digits only, without the maker's words."""
    return re.sub(r"[^a-z0-9]", "", WORDS.sub("", name.lower()))


def _unknown(name: str) -> ConfigError:
    known = {_plain(key): key for key in DEVICES}
    close = [known[match] for match in get_close_matches(_plain(name), known, n=3, cutoff=0.4)]
    closest = f"the closest are {', '.join(close)}; all" if close else "the names"
    return ConfigError(
        f"the device {name!r} is unknown: {closest} are {', '.join(DEVICES)}, and `cpu` and `this` "
        "for this machine."
    )
