"""Data sets that are downloaded, or that come with scikit-learn."""
