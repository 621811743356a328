"""Commands that write what the pages show: `python -m benchmarks.NAME`, from the root of a checkout."""
