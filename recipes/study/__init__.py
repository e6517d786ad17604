"""Compares FAM with other methods, in one command; ``recipes/study/README.md`` shows the results."""
