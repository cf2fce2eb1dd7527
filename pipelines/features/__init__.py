"""Features as a store's spec asks for them."""
