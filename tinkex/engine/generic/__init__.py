"""The generic path: any causal language model of transformers, computed by its own modules."""
