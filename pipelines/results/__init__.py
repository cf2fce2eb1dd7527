"""What jobs leave in a store beside the extraction: one file a kind, and what checks it."""
