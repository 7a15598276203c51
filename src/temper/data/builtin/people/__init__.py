"""Invented people with questions, paraphrases and perturbed answers (see README.md)."""

__all__: list[str] = []
