"""The command `train`: a network of the zoo on real data."""
