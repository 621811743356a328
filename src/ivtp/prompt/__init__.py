"""Prompts as batches, the templates that write them, and the question inside a prompt."""
