"""Measurements that anyone can repeat: `python -m benchmarks.NAME --help` in the root of the
repository.
"""
