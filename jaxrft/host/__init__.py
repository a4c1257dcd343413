"""What touches the machine: files, signals, processes, other hosts."""
