"""What stands in a model's way before one of its layers is looked at: vLLM, device, sizes."""

from __future__ import annotations

from vllm_quantkit.check.architectures import check_architecture
from vllm_quantkit.check.findings import Findings
from vllm_quantkit.check.kernels import capability
from vllm_quantkit.check.release import Release, check_release, installed_release
from vllm_quantkit.check.request import CheckRequest
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.footprint import Model
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.schemes import SCHEMES
from vllm_quantkit.schemes.served_layers import MIN_CAPABILITY

SCALED_POSITIONS = ("rope_scaling", "rope_parameters")
"""Keys of config.json that may make a model longer than the positions it names."""


def check_surroundings(
    request: CheckRequest, model: Model, device: Device, release: Release, findings: Findings
) -> None:
    """vLLM's release, the device, the architecture and the length are served."""
    with findings.attempt("version"):
        check_release(release)
    with findings.attempt("device"):
        check_device(device, request.quantization)
    with findings.attempt("architecture"):
        name = model.facts.architecture
        if release != installed_release():
            findings.warn(
                f"vLLM {release} is not installed here: nobody checked that it has {name}."
            )
        else:
            check_architecture(name)
    with findings.attempt("options"):
        check_method(request.quantization)
    with findings.attempt("length"):
        check_length(model, request.max_model_len)


def check_device(device: Device, quantization: str | None) -> None:
    """vLLM runs on the device, and the plugin's kernels do if they are asked for.

    Raises:
        UnsupportedScheme: they do not.
    """
    if device.kind == "apple":
        raise UnsupportedScheme(
            f"vLLM has no kernels for {device.name}'s GPU; use a CUDA device or a CPU, or "
            f"llama.cpp with a GGUF file on this machine."
        )
    major, minor = device.capability or (99, 0)
    if quantization in SCHEMES and 10 * major + minor < MIN_CAPABILITY:
        least = f"{MIN_CAPABILITY // 10}.{MIN_CAPABILITY % 10}"
        raise UnsupportedScheme(
            f"--quantization {quantization} needs compute capability {least} (Ampere), but "
            f"{device.name} has {capability(device)}; use a newer GPU, or drop the flag."
        )


def check_method(quantization: str | None) -> None:
    """`--quantization` names a method of the plugin, or is not given.

    Raises:
        ConfigError: it names something else.
    """
    if quantization is not None and quantization not in SCHEMES:
        raise ConfigError(
            f"--quantization {quantization} is none of vllm-quantkit's methods, which are "
            f"{', '.join(SCHEMES)}; name one of them, or drop the flag to see what vLLM itself "
            f"does with the checkpoint."
        )


def check_length(model: Model, length: int | None) -> None:
    """The longest sequence is one that the model has positions for.

    Raises:
        ConfigError: it has not.
    """
    longest = model.facts.max_position
    if length is None or not longest or length <= longest or _is_scaled(model):
        return
    raise ConfigError(
        f"--max-model-len {length} is more than the {longest} positions of the model "
        f"(max_position_embeddings in config.json); use at most {longest}."
    )


def _is_scaled(model: Model) -> bool:
    """True where positions are stretched, so that vLLM derives another length."""
    for key in SCALED_POSITIONS:
        found = model.config.get(key)
        if isinstance(found, dict) and found.get("rope_type", found.get("type")) not in (
            None,
            "default",
        ):
            return True
    return False
