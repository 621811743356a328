"""What a prefill costs, from sizes alone."""
