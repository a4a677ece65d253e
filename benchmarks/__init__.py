"""What only developers run, from the checkout: `python -m benchmarks.NAME`."""
