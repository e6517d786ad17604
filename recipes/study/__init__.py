"""Does the proximal step hold? The study behind ``recipes/study/README.md``: one command, restartable.

conditions  what is learned, and with which seeds
defaults    stages without a search, and those that choose the defaults
search      stages with a search
ablations   other forms of the step
flattening  kappa of every layer along training
stages      all of them by name
methods     what is compared
trial       trains one network, and measures it
cost        what a step of each method costs
analysis    selection on validation data, paired differences, corrected p-values
tables      rows, columns and cells
sections    the tables with their captions
pictures    drawn from the saved results
"""
