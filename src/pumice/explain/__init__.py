"""Where an answer looked: attention over the pictures per word, and whether the pictures mattered."""
