"""What every recipe needs: results as JSON and tables."""
