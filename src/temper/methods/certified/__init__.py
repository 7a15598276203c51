"""Provable robustness of classifiers."""
