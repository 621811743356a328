"""Trained projectors that give a few tokens of an image, one file each; `ivtp.list_compressors()` finds them."""
