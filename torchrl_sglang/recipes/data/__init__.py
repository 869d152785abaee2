"""Questions, tasks, rewards and environments. May import nothing else of the recipes."""
