"""What a run tells: log lines, metrics, curves."""
