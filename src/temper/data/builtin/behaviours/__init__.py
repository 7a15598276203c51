"""Fictional forbidden topics with harmless replies, and benign look-alikes (see README.md)."""

__all__: list[str] = []
