"""The small models that ship inside the package, and how they are made."""
