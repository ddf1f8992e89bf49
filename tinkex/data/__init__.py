"""Training data: files -> checked records -> datums."""
