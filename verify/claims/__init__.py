"""One claim a file: what the gate judges, of the definition, of a release (test_release*),
of somebody's code (test_implementation*)."""
