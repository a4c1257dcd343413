"""Predicts every task's pass rate from a few that were just measured, and selects by it [arXiv
2506.05316].
"""
