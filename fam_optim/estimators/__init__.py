"""How kappa ``<F F^T, T>`` is computed: a file for each way ("mode"). F is made of the weights (`measure`).

full         forms H: the definition
exact        the same number without H
softmax      its closed form where the layer feeds a softmax cross-entropy
hutchinson   unbiased, from random probes
"""
