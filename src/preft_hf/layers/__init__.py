"""The adapter layers, and the phase of the running forward that they read.

Imports `preft_hf.config` and `preft_core`.
"""
