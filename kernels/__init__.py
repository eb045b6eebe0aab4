"""One op per file, each with its torch reference. The table is in `README.md`."""
