"""From a list of URLs to token shards."""
