"""Repeats the paper's figures on the cost of second derivatives, and draws what kappa means."""
