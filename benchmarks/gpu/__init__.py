"""Session on a GPU that is available for minutes: checks first, then measurements."""
