"""The twelve benchmarks' formats in the micro world, one file each; `ivtp.registry` finds them by their files."""
