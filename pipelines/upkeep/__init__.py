"""Looking after a store: verify, compact, stats."""
