"""Making a model forget chosen things, and checking that it did."""
