"""PreFT adapters on vLLM 0.32: a general plugin, no fork. docs/how-to/vllm.md says what works and what is replaced."""
