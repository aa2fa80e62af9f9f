"""The package's version, in a file of its own: nothing has to import the package root for it."""

__version__ = "0.1.0"
