"""The networks and their mathematics. torch only."""
