"""Where keys and values live: page table, page stores, tiers, page frames. Does not import methods or transformers."""
