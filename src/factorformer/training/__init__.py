"""How factors learn; plain torch, usable from any training loop."""
