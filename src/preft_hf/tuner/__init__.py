"""PEFT's face: target modules, attaching layers, loading and saving weights, and the registration of the type PREFT.

Imports `forward`, `layers`, `config` and `preft_core`.
"""
