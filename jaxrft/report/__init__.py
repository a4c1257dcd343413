"""What a run says of itself: metrics on the device, metrics.jsonl, the console."""
