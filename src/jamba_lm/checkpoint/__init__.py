"""Where weights come from and where they go: checkpoints on disk, in the formats others use."""
