"""The adapter on disk: config, safetensors header, weights, fingerprint, atomic writes, and the way to and from LoRA.

Ground floor: imports torch, safetensors and `preft_core.orthonormal`.
"""
