"""A process that imports vLLM once and forks a child for every engine asked for.

Importing vLLM takes longer than starting a tiny engine, and two engines in one process disturb
each other. One JSON job a line on stdin, one JSON result a line on stdout.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tests.reference_model import layer_input
from vllm_quantkit.integration.engine_worker.generation import generate, lora_request
from vllm_quantkit.integration.engine_worker.operations import find_operation
from vllm_quantkit.integration.engine_worker.process import claim_stdout, send, start
from vllm_quantkit.integration.engine_worker.scoring import score

SHARED = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm_quantkit.integration.config",
)
"""What an engine imports, imported before the fork."""


def main() -> None:
    answers = claim_stdout()
    for module in SHARED:
        import_module(module)
    send(answers, ready=True)
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            with os.fdopen(write, "w") as result:
                json.dump(run(json.loads(line)), result)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as result:
            text = result.read()
        _, status = os.waitpid(pid, 0)
        send(answers, **(json.loads(text) if text else {"error": f"engine died: {status}"}))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, ask it, and return answers and what quantkit logged."""
    log = record_log()
    os.environ.update(job["env"])
    if dict(job["spec"]["options"])["enforce_eager"]:
        # vLLM compiles a few of its own functions in spite of that.
        import_module("torch._dynamo").config.disable = True
    try:
        engine = start(job["spec"])
        answers = [operation(ask.pop("op"))(engine, **ask) for ask in job["asks"]]
    except Exception as error:  # the test decides whether it was expected
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "log": log}
    return {"answers": answers, "log": log}


def operation(name: str) -> Callable[..., Any]:
    """An operation of tests, or else of the engine's own process."""
    return OPERATIONS.get(name) or find_operation(name)


def record_log() -> list[str]:
    """A list that grows with every record of quantkit's logger."""
    lines: list[str] = []

    def record(entry: logging.LogRecord) -> bool:
        lines.append(f"{entry.levelname}: {entry.getMessage()}")
        return True

    # A filter, since an engine takes the handlers away when it configures logging.
    logging.getLogger("vllm.quantkit").addFilter(record)
    return lines


def reload_weights(engine: Any) -> None:
    engine.collective_rpc("reload_weights")


def multiply(
    engine: Any, layers: list[str], rows: int, adapter: str | None = None
) -> list[list[list[float]]]:
    """What each linear layer of the model, by its name in vLLM, makes of `layer_input`.

    With the LoRA adapter in folder `adapter`, if one is given.
    """

    def run(worker: Any) -> list[list[list[float]]]:
        model = worker.model_runner.get_model()
        if hasattr(worker.model_runner, "lora_manager"):
            activate(worker, adapter, rows)
        modules = [model.get_submodule(name) for name in layers]
        inputs = [layer_input(rows, module.input_size) for module in modules]
        return [module(x)[0].tolist() for module, x in zip(modules, inputs, strict=True)]

    (outputs,) = engine.collective_rpc(run)
    return outputs


def activate(worker: Any, adapter: str | None, rows: int) -> None:
    """Let the next `rows` rows that a layer is given belong to one prompt with `adapter`."""
    from vllm.lora.layers import LoRAMapping

    request = lora_request(adapter)
    number = 0 if request is None else request.lora_int_id
    mapping = LoRAMapping((number,) * rows, (number,), is_prefill=True)
    worker.model_runner.lora_manager.set_active_adapters({request} - {None}, mapping)


def parameters(engine: Any, names: list[str]) -> list[list[Any]]:
    """These parameters of the model, by their names in vLLM, in every rank."""

    def read(worker: Any) -> list[Any]:
        model = worker.model_runner.get_model()
        return [model.get_parameter(name).float().tolist() for name in names]

    ranks: list[list[Any]] = engine.collective_rpc(read)
    return ranks


def cache_tokens(engine: Any) -> list[int]:
    """Tokens that the KV cache holds in one block of memory, and blocks of it."""
    config = engine.llm_engine.vllm_config.cache_config
    return [config.block_size, config.num_gpu_blocks]


def cache_kernels(engine: Any) -> int:
    """Kernels of INT4 caches that this process has compiled."""
    return len(import_module("quantkit_kernels.kv_int4.cpu_workers")._workers)


OPERATIONS = {
    "cache_tokens": cache_tokens,
    "cache_kernels": cache_kernels,
    "score": score,
    "generate": generate,
    "reload": reload_weights,
    "multiply": multiply,
    "parameters": parameters,
}

if __name__ == "__main__":
    main()
