"""The command line of drift, quality and bench: light to import, so that an oracle that cannot be had is one line."""
