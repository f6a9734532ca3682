"""The command `quantkit`: options in, one function of the package behind each command."""

from vllm_quantkit.cli.app import app

__all__ = ["app"]
