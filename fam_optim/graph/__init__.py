"""The autograd graph of a loss: what its operations are, and what may be concluded from them."""
