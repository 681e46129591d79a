"""What a round costs: bytes and time."""
