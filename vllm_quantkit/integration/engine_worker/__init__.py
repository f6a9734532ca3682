"""The process behind `vllm_quantkit.engine.Engine`: one JSON request a line, one JSON answer."""
