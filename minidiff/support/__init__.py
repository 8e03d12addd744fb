"""What lies beneath the chapters: checkpoints, data, metrics."""
