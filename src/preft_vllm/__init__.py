"""PreFT adapters on vLLM 0.32: a general plugin, no fork. docs/vllm.md lists what works and what is replaced."""
