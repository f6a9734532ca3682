"""Start the engine described by the first argument, then answer until input ends."""

from vllm_quantkit.integration.engine_worker.operations import find_operation
from vllm_quantkit.integration.engine_worker.process import serve

if __name__ == "__main__":
    serve(find_operation)
