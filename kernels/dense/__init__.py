"""Matrix products and norms."""
