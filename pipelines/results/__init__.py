"""What jobs leave in a store besides the extraction: one file a kind, and what checks it."""
