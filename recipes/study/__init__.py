"""The comparison of FAM with other methods, in one command; ``recipes/study/README.md`` shows its results."""
