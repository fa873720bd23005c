"""What a model can do: measurements of its quality."""
