"""Looking after a store: verify, repair, compact, stats."""
