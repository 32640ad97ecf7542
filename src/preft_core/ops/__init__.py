"""Adapter arithmetic: what an adapter adds to the rows it is given.

Dimensions in tensor names: T tokens (any leading dimensions), R rank, D input width, N output width. The residual
stream of a decoder layer has D == N.
"""

from preft_core.ops.reference import direft_update, lora_update, loreft_update, orthonormal_rows

__all__ = ["direft_update", "lora_update", "loreft_update", "orthonormal_rows"]
