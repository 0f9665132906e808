"""The version: its single source."""

__version__ = "0.1.0"
