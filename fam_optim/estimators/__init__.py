"""How kappa ``<F F^T, T>`` is computed: ways ("modes"), from a factor F made of the weights (`measure`)."""
