"""Speed, memory and size as ratios measured in one run. Not tests: `make bench` prints a table and keeps it."""
