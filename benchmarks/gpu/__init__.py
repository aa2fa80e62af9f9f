"""A session on a GPU that is there for minutes: checks first, then numbers."""
