"""What a run needs around the mathematics: devices, checkpoints, logs, progress."""
