"""The user's verbs: fuse, unfuse, explain, refresh, verify."""
