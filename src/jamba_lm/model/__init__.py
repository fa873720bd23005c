"""What Jamba is: layers, mixers, experts and state. Knows no checkpoint, prompt or training."""
