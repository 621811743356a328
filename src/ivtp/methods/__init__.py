"""Pruning methods, one file each; `ivtp.list_methods()` finds them by their files."""
