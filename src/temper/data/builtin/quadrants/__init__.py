"""Tiny pictures in four classes (see README.md)."""

__all__: list[str] = []
