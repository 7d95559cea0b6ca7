"""From prompts to outputs: Engine and its drivers, the core loop, and the executors that carry steps to the workers."""
