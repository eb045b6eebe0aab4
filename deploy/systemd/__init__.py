"""systemd units for a node, and `glimmer systemd`, which writes them."""
