"""Real servers that tests start on this machine. Each ends with its block, by its own process id."""
