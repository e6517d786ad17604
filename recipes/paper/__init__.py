"""The paper's figures on the cost of second derivatives, and what relative flatness means in pictures."""
