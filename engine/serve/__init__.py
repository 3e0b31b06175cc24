"""`r1 serve`: an OpenAI-compatible HTTP server over the rollout engine."""
