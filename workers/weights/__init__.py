"""From checkpoint files to the weights of one rank."""
