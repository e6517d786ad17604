"""Estimators compute kappa ``<F F^T, T>``: each file is a way ("mode") to do so; `measure` makes F of W."""
