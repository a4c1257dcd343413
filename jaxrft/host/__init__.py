"""Files, signals, processes and other hosts."""
