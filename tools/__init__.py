"""Programs for developers: the environments, and the bundled model."""
