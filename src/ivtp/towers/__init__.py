"""Stacks of layers, one file each: where attention and feed-forward are, and how a layer falls into two halves."""
