"""What the devices compute."""
