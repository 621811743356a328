"""The pseudo CLS token of a prompt, and the text sides that rate its words."""
