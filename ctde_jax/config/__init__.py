"""From words to objects and back."""
