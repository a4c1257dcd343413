"""What is made ready before a run: data sets, and the pass rates of reference policies."""
