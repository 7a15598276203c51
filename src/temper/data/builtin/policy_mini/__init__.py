"""Twelve neutral policy classes in the row schema of a class-balanced refusal benchmark (see README.md)."""

__all__: list[str] = []
