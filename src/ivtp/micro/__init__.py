"""The embedded micro LVLM: its synthetic world, its training recipe and its released weights."""
