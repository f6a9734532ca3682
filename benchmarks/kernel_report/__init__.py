"""What the compiler makes of every Triton kernel, ours and vLLM's: instructions, registers."""
