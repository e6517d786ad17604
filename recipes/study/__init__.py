"""Where to be flat? The study behind ``recipes/STUDY.md``: one command, restartable.

protocol   which networks are trained: conditions, stages, seeds
methods    what is compared, each with one value
tasks      samples and networks by name
networks   the networks
trial      trains one network, and measures it
cost       what a step of each method costs
analysis   selection on validation data, paired differences, corrected p-values, rank correlations
tables     rows, columns and cells
report     the tables with their captions
pictures   drawn from the saved results
"""
