"""`python -m vllm_quantkit.cli`."""

from vllm_quantkit.cli.app import app

if __name__ == "__main__":
    app()
