"""How nothing is lost: run folders, checkpoints, resuming."""
