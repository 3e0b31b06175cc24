"""Prompts, documents, tokens: what the stages read."""
