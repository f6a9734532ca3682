"""Devices as data, and this machine's measured."""

from vllm_quantkit.hardware.catalogue import DEVICES, find_device
from vllm_quantkit.hardware.device import Device, Kind, Number

__all__ = ["DEVICES", "Device", "Kind", "Number", "find_device"]
