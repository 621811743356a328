"""The `ivtp` command: parse, call the library, print."""
