"""The pictures that ship with the repository, and the small web that serves them."""
