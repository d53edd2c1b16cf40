"""How much memory a cache takes, and whether there is enough."""
