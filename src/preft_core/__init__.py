"""The parts of PreFT that need neither transformers nor peft: token rules, the adapter format, adapter arithmetic."""
