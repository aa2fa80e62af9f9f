"""The installer's way in; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
