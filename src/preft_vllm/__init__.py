"""PreFT adapters on vLLM 0.32: a general plugin, no fork. See docs/how-to/vllm.md."""
