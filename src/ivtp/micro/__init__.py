"""The embedded micro LVLM: its synthetic world, the formats of its questions, and its released weights."""
