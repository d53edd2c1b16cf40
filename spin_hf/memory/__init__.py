"""Memory planning: what a cache needs, caps, admission control and reclaim."""
