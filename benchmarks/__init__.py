"""What PreFT costs, measured: `python -m benchmarks.run`."""
