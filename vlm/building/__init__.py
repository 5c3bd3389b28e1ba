"""From descriptions to a finished network, and back: instances, empty networks, where every tensor comes from."""
