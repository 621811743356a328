"""How what ships with the library was made; no part of the wheel."""
