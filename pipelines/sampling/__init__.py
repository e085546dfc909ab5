"""From a prompt to pictures."""
