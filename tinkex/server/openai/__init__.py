"""Endpoints in the style of OpenAI and of Anthropic, over the same samplers as `asample`.

What they have in common with the Tinker API: keys, owners, limits, and the running batch.
"""
