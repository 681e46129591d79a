"""Data sets that are downloaded or come with scikit-learn."""
