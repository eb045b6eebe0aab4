"""For nodes without a network: wheels are gathered where there is one, and installed from there."""
