"""Training loops built on the public clients."""
