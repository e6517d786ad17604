"""Does the proximal step hold? The study behind ``recipes/study/README.md``: one command, restartable."""
