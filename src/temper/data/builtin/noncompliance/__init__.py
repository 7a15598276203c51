"""Requests that call for non-compliance, their answerable look-alikes and ordinary requests (see README.md)."""

__all__: list[str] = []
