"""The command `preft`. It imports preft_hf only when a command needs it, so that `preft --help` is fast."""
