"""What scripts/compare_published.py is made of: real layers, and the authors' own code run on them without a GPU."""
