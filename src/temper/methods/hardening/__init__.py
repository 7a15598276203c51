"""Safeguards that survive attack and tampering."""
