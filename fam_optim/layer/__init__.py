"""A layer: what its calls leave on the graph, and what it computes."""
