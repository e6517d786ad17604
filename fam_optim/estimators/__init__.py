"""Estimators ("modes"), one per file: from a tail and a factor F to ``<F F^T, T>``.

full         forms H: the definition
exact        the same number without H
softmax      its closed form where the layer feeds a softmax cross-entropy
hutchinson   unbiased, from random probes
"""
