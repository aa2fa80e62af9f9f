"""Search for the fastest right candidate for each layer on this device, and the tables that keep it."""
