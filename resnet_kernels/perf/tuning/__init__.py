"""Finding the fastest right candidate for each layer on this device, and writing it down."""
