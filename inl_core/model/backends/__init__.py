"""Ways to compute the T iterations of one layer: plain, with a hand-written backward pass, compiled, on a GPU."""
