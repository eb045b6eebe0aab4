"""The ops of the model, each with a torch reference. The table of all ops is in `README.md`."""
