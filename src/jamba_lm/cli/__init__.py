"""The `jamba` command: parse, call, print. Nothing else in the package prints."""
