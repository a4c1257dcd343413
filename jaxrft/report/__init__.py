"""Reports of a run: metrics computed on the device, metrics.jsonl, the console."""
