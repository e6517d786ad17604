"""Does FAM help? The study behind ``recipes/study/README.md``: one command, restartable.

protocol   which networks are trained: tasks, methods, grids, seeds
methods    what is compared, each with one hyper-parameter
penalties  kappa of a softmax head written out, so that parts of it can be held constant
samples    the data
trial      trains one network, and measures it
analysis   selection on validation data, paired differences, regrets, rank correlations
pictures   drawn from the saved results
"""
