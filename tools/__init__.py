"""Programs around the path. Each runs by itself, from any working directory."""
