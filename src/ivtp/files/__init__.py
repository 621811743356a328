"""What is read from and written to a disk with care: checkpoints, results, and which machine this is."""
