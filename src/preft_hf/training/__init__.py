"""Data, collator, trainers, distillation and the runs behind `preft train` and `preft distill`.

Imports `tuner`, `forward`, `layers`, `config` and `preft_core`.
"""
