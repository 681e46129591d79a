"""What is read from and written to files and standard streams."""
