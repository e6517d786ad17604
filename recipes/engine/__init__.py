"""Trains any task with any optimizer: what a task is, its optimizers, batches, run folders, progress."""
