"""Jobs over a store of DINO features: Ray stages, Delta tables, configuration and the command line."""
