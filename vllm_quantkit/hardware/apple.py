"""Apple's chips: memory that CPU and GPU share, and its bandwidth.

No kernels here run on their GPUs, and Apple publishes no rates of matrix products.
"""

from __future__ import annotations

from vllm_quantkit.hardware.device import Device

GIB = 1 << 30

NEWS = "https://www.apple.com/newsroom"
M1_PRO = (
    f"{NEWS}/2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built/"
)
M1_ULTRA = (
    f"{NEWS}/2022/03/apple-unveils-m1-ultra-the-worlds-most-powerful-chip-for-a-personal-computer/"
)
M2 = f"{NEWS}/2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities/"
M2_PRO = (
    f"{NEWS}/2023/01/"
    "apple-unveils-m2-pro-and-m2-max-next-generation-chips-for-next-level-workflows/"
)
M2_ULTRA = f"{NEWS}/2023/06/apple-introduces-m2-ultra/"
M3 = "https://support.apple.com/en-us/117735"
M3_PRO = "https://support.apple.com/en-us/117736"
M3_ULTRA = f"{NEWS}/2025/03/apple-reveals-m3-ultra-taking-apple-silicon-to-a-new-extreme/"
M4 = f"{NEWS}/2024/05/apple-introduces-m4-chip/"
M4_PRO = f"{NEWS}/2024/10/apple-introduces-m4-pro-and-m4-max/"


def _chip(name: str, gib: int, gigabytes_per_second: float, source: str) -> Device:
    """A chip with the most memory that is sold with it."""
    return Device(
        name=f"Apple {name}",
        kind="apple",
        memory_bytes=gib * GIB,
        bandwidth=gigabytes_per_second * 1e9,
        source=source,
    )


APPLE_DEVICES: dict[str, Device] = {
    "m1-pro": _chip("M1 Pro", 32, 200, M1_PRO),
    "m1-max": _chip("M1 Max", 64, 400, M1_PRO),
    "m1-ultra": _chip("M1 Ultra", 128, 800, M1_ULTRA),
    "m2": _chip("M2", 24, 100, M2),
    "m2-pro": _chip("M2 Pro", 32, 200, M2_PRO),
    "m2-max": _chip("M2 Max", 96, 400, M2_PRO),
    "m2-ultra": _chip("M2 Ultra", 192, 800, M2_ULTRA),
    "m3": _chip("M3", 24, 100, M3),
    "m3-pro": _chip("M3 Pro", 36, 150, M3_PRO),
    "m3-max": _chip("M3 Max", 128, 400, M3_PRO),
    "m3-ultra": _chip("M3 Ultra", 512, 819, M3_ULTRA),
    "m4": _chip("M4", 32, 120, M4),
    "m4-pro": _chip("M4 Pro", 64, 273, M4_PRO),
    "m4-max": _chip("M4 Max", 128, 546, M4_PRO),
}
"""Short name to chip; a machine may have less memory."""
