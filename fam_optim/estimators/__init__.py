"""Estimators ("modes"): from a tail and a factor F to ``<F F^T, T>``."""
