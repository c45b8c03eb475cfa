"""`pytest verify/`: options, fixtures, and the hooks that turn a run into a verdict."""
