"""What every recipe needs: the command line, timing, tables, pictures, and results as JSON."""
