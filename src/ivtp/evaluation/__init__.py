"""Accuracy: methods compared on the same questions."""
