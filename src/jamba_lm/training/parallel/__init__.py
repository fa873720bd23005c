"""One model on many processes: tensor, sequence, expert and context parallelism of a decoder."""
