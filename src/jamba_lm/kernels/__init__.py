"""How Jamba is computed: tensors in, tensors out, and no knowledge of any config."""
