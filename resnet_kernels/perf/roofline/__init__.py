"""How fast a network could be at most, and what it launches."""
