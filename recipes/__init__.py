"""Recipes: complete trainings with FAM and its neighbours, one entry point per question.

``python -m recipes.quickstart`` is the first to run. The recipes import ``fam_optim``, never the reverse.
"""
