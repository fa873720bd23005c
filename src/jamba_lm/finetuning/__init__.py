"""How a finished model goes on learning: all of its weights, or an adapter beside them."""
