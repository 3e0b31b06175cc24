"""r1.engine: the thin driver: command line, configuration, stages, rewards, rollout, data and report."""
