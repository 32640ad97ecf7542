"""What prefill-only costs, and how rank buys it back: `python -m benchmarks.quality`."""
