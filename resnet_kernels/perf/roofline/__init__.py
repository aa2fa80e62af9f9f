"""Upper limits on a network's speed, and counts of its launches."""
