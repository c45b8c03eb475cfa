"""What headers and small files tell of a release, before a weight is read: `python -m verify audit`."""
