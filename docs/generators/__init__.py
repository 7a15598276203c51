"""Pages and tables made from the source; `docs/generate.py` runs them."""
