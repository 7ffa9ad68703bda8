"""The floor that all rooms stand on; knows nothing of ours. Its modules are imported by name: some need no torch."""
