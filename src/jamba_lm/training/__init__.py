"""How a Jamba learns: recipe, optimizer, loop, checkpoints. Knows no command line."""
