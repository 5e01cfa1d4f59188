"""Real servers that tests start on this machine: PostgreSQL, MLflow. Each ends with its block, by its own process id."""
