"""Prepares inputs of a run: data sets, pass rates of reference policies, embeddings, predictors."""
