"""The command `preft`, apart from preft_hf, whose import takes seconds that `preft --help` should not."""
