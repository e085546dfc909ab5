"""What each job can be told: one file a verb, its presets at the end."""
