"""r1.parallel: the Megatron-core layer: process groups, model specs, step, checkpoint and conversion."""
