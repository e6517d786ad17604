"""Experiments with FAM and other methods, each run by one command.

``python -m recipes.quickstart`` is the first. The recipes import ``fam_optim``, never the reverse.
"""
