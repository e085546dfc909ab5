"""What the stages do, without Ray."""
